"""What is asked of runs: how they compare, which settings are best, and what a model does with a text."""
