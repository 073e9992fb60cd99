"""How keys and values meet queries: one algorithm per file, one signature."""
