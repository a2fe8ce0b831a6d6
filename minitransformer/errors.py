"""Mistakes that a user can mend."""


class UserError(Exception):
    """What is wrong, with which value, and what to do, in one sentence; the command line prints it and exits with 2.

    It is no ValueError, because parsers of command lines catch those and dress them in words of their own.
    """

    exit_code = 2


class StorageError(UserError):
    """A disk that is full or may not be written, or a file on it that is damaged; the command line exits with 1."""

    exit_code = 1
