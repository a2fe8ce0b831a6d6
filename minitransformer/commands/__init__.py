"""One file for each command: parsing and printing only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from minitransformer.errors import UserError

Options = TypeVar("Options")

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def run_command(command: Callable[[], int | None]) -> int:
    """The exit code of `command`; a user's mistake is one sentence on standard error instead of a traceback."""
    try:
        return command() or DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; without this, Python complains when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def parse(options: type[Options], arguments: Sequence[str], *, default: Options | None = None, **about: str) -> Options:
    """`options` from the command line, with flat flags; `--help` shows the values of `default`.

    A flag that does not exist or does not parse ends the program with exit code 2.
    """
    import tyro

    return tyro.cli(
        options,
        args=list(arguments),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.OmitArgPrefixes,),
        **about,  # type: ignore[call-overload]
    )
