"""Analysis of runs: comparison, hyper-parameter search, and inspection of a model on a text."""
