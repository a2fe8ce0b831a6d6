"""Errors that a user can fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What is wrong, with which value, and what to do, in one sentence; the command line prints it and exits with 2.

    It is not a ValueError, because command-line parsers catch those and replace their message.
    """

    exit_code = 2
    reported = False
    """whether another process reports it"""

    def __init__(self, sentence: str) -> None:
        # Names and values from files may hold line breaks, and sequences that control a terminal.
        super().__init__("".join(each if each.isprintable() else repr(each)[1:-1] for each in sentence))


class StorageError(UserError):
    """A disk that is full or not writable, or a damaged file; the command line exits with 1."""

    exit_code = 1


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "did you mean …? " with the nearest of the `known` names; empty if none is near."""
    return "".join(f"did you mean {match!r}? " for match in get_close_matches(name, list(known), n=1, cutoff=0.5))
