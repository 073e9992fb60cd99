"""Cases and results judged: `session` one line a result, `compare` the results of several backends."""
