"""A MindIE `config.json`: read it, check it, and say what each card will do. Needs neither JAX nor torch to check."""
