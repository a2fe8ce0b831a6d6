"""Mistakes that a user can mend."""


class UserError(Exception):
    """What is wrong, with which value, and what to do, in one sentence; the command line prints it and exits with 2.

    It is no ValueError, because parsers of command lines catch those and dress them in words of their own.
    """
