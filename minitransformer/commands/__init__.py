"""One file for each command: parsing and printing only."""

from __future__ import annotations

import gc
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from minitransformer.errors import UserError
from minitransformer.plugins import load_installed_plugins, load_plugin, take_plugins
from minitransformer.text.standard_input import without_standard_input

if TYPE_CHECKING:
    from minitransformer.training.config import DataConfig

Options = TypeVar("Options")

SEVERAL = ("--data", "--validation-data")
"""flags that take one value or several"""
PLUGINS = "With --plugin FILE.py, which may be repeated, the variants that the Python file defines are choices too."
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, UserError.exit_code, 130


def start(name: str, arguments: Sequence[str]) -> int:
    """Run the command called `name`; returns its exit code."""
    # Importing torch makes a million objects that stay. To look for garbage among them takes a tenth of a second each
    # time, some of it before the first answer.
    gc.disable()
    try:
        with _deaf_to_ctrl_c():
            arguments = with_plugins(arguments)
            command = import_module(f"minitransformer.commands.{name}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        gc.freeze()
        gc.enable()
    return command.main(arguments)


def with_plugins(arguments: Sequence[str]) -> list[str]:
    """`arguments` without the plugins that they name, which are loaded, as are installed ones."""
    load_installed_plugins()
    paths, rest = take_plugins(arguments)
    for path in paths:
        load_plugin(path)
    return rest


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard at the end: libraries in C++ that it finds while they are imported abort."""
    if not hasattr(signal, "pthread_sigmask"):  # a system without them
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_command(command: Callable[[], int | None]) -> int:
    """The exit code of `command`; a user's mistake is one sentence on standard error instead of a traceback."""
    try:
        return command() or DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; without this, Python complains when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def parse(
    options: type[Options],
    arguments: Sequence[str],
    *,
    known: Iterable[str] = (),
    **about: str,
) -> Options:
    """`options` from the command line, with flat flags; `known` are more settings that have one.

    Raises `UserError` for a flag that does not exist; a value that does not parse ends the program with exit code 2.
    """
    import tyro

    about["description"] = f"{about.get('description', '')}\n\n{PLUGINS}"
    parsed, unknown = tyro.cli(
        options,
        args=joined(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
        **about,  # type: ignore[call-overload]
    )
    if unknown:
        from minitransformer.commands.unknown_flags import check_known

        check_known(options, known, unknown)
    return parsed


def given_flags(arguments: Sequence[str]) -> set[str]:
    """The fields that the flags among `arguments` set."""
    flags = (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.replace("-", "_") for flag in flags}


def joined(arguments: Sequence[str]) -> list[str]:
    """`arguments` with all values of each flag among `SEVERAL` behind its first: it may also be repeated for each."""
    result: list[list[str]] = []
    values: dict[str, list[str]] = {}
    taking: list[str] | None = None
    for word in arguments:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in SEVERAL:
            if flag not in values:
                values[flag] = [flag]
                result.append(values[flag])
            taking = values[flag]
            if equals:
                taking.append(value)
        elif taking is not None and (word == "-" or not word.startswith("-")):
            taking.append(word)
        else:
            taking = None
            result.append([word])
    return [word for words in result for word in words]


def with_files(data: DataConfig) -> DataConfig:
    """The data of a run, with a file that holds standard input where it was told to read that."""
    sources: dict[str, Any] = {
        "data": without_standard_input(data.data, data.validation_data),
        "validation_data": without_standard_input(data.validation_data, data.data),
    }
    return replace(data, **sources)


def piped_text() -> str:
    """The text on standard input if that is a pipe or a file: a terminal, /dev/null or a closed one holds none."""
    if sys.stdin is None:
        return ""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    is_piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
    return utf8_text(sys.stdin.buffer.read(), "standard input") if is_piped else ""


def utf8_text(content: bytes, name: str) -> str:
    """`content`, the bytes of the file called `name`, as text; raises `UserError` where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 (byte {error.start} is {content[error.start]:#04x}): convert it"
        ) from None
