"""What is measured beside what, and what may be said of it.

Nothing here imports torch until a contestant's own process needs it: help and mistakes are answered at once.
"""
