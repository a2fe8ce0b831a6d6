"""Mistakes that a user can mend."""


class UserError(ValueError):
    """What is wrong, with which value, and what to do, in one sentence; the command line prints it and exits with 2."""
