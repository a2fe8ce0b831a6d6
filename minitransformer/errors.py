"""Mistakes that a user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What is wrong, with which value, and what to do, in one sentence; the command line prints it and exits with 2.

    It is no ValueError, because parsers of command lines catch those and dress them in words of their own.
    """

    exit_code = 2


class StorageError(UserError):
    """A disk that is full or may not be written, or a file on it that is damaged; the command line exits with 1."""

    exit_code = 1


def suggestion(name: str, known: Iterable[str]) -> str:
    """A question after the nearest of the `known` names, for an error about `name`; empty if none is near."""
    return "".join(f"did you mean {match!r}? " for match in get_close_matches(name, list(known), n=1, cutoff=0.5))
