"""One file for each command: parsing and printing only."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import stat
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from typing_extensions import Doc

from minitransformer.errors import UserError
from minitransformer.files import existing
from minitransformer.plugins import load_installed_plugins, load_plugin, take_plugins
from minitransformer.processes import is_launched
from minitransformer.registry import lookup
from minitransformer.text.standard_input import names_standard_input, without_standard_input

if TYPE_CHECKING:
    from minitransformer.training.data_config import DataConfig

Options = TypeVar("Options")
P = ParamSpec("P")

SEVERAL = ("--data", "--validation-data")
"""flags that take one value or several"""
PLUGINS = "--plugin FILE.py (repeatable) adds the variants that a Python file defines to the choices."
DONE, FAILED, USAGE, NON_FINITE, INTERRUPTED = 0, 1, UserError.exit_code, 3, 130
ON_RANKS = {"train", "doctor", "verify-resume"}
"""commands that the processes of `torchrun` run together"""
HELP = {"-h", "--help"}
WIDTH = 80
"""of `--help` and of tables, in characters"""
LEAST_WIDTH, MOST_WIDTH = 40, 120
"""of a table that fits a terminal"""
SMALLEST = Doc(
    "smallest difference in the metric's unit that names a winner; None is 0.002 for losses and bits per byte, and 0 "
    "for other metrics"
)


def with_exit_code(command: Callable[P, int | None]) -> Callable[P, int]:
    """`command` with an exit code; a user's mistake is one sentence on standard error instead of a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs) or DONE
        except UserError as error:
            if not error.reported:
                print(f"error: {_name_of_rank()}{error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of our output has closed the pipe; without this, Python reports an error when it flushes at
            # exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED

    return run


def _name_of_rank() -> str:
    """The name of another rank than 0, before they have joined, to report an error that rank 0 does not have.

    When rank 0 ends with an error, `torchrun` ends this process meanwhile.
    """
    if (rank := os.environ.get("RANK", "0")) == "0":
        return ""
    time.sleep(5)
    return f"rank {rank}: "


@with_exit_code
def start(name: str, arguments: Sequence[str]) -> int:
    """Run the command called `name`; returns its exit code."""
    if is_launched():
        if name not in ON_RANKS and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"`{name}` is one process, and torchrun has started several: start it without torchrun")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one rank reports what happens to another, in a sentence
    # Importing torch creates a million permanent objects. Each garbage collection over them takes a tenth of a second,
    # some of them before the first output.
    gc.disable()
    try:
        with _delay_ctrl_c():
            arguments = with_plugins(arguments)
            command = load_command(name)
    finally:
        gc.freeze()
        gc.enable()
    return command.main(arguments)


def load_command(name: str) -> ModuleType:
    """The file of the command called `name`."""
    return import_module(f"minitransformer.commands.{name.replace('-', '_')}")


def with_plugins(arguments: Sequence[str]) -> list[str]:
    """Load the plugins named in `arguments` and the installed ones; returns the other arguments."""
    load_installed_plugins()
    paths, rest = take_plugins(arguments)
    for path in paths:
        load_plugin(path)
    return rest


@contextmanager
def _delay_ctrl_c() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block: C++ libraries abort when interrupted during import."""
    if not hasattr(signal, "pthread_sigmask"):  # not on this system
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parse(
    options: type[Options], arguments: Sequence[str], *, prog: str, description: str = "", known: Iterable[str] = ()
) -> Options:
    """Parse `options` from flat flags; `known` are further settings that have flags.

    Raises `UserError` for a flag that does not exist; a value that does not parse ends the program with exit code 2.
    """
    import tyro

    if HELP & set(arguments):
        # tyro joins the lines of a description and never breaks them, so it is printed before.
        for line in f"{description}\n\n{PLUGINS}\n".split("\n"):
            print(textwrap.fill(line, WIDTH))
    parsed, unknown = tyro.cli(
        options,
        prog=prog,
        description="",
        args=joined(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
    )
    if unknown:
        from minitransformer.commands.unknown_flags import check_known

        check_known(options, known, unknown)
    return parsed


def task_of(command: str, arguments: Sequence[str], tasks: Mapping[str, str], operands: str) -> str:
    """The task that `arguments` begin with; without one, the `tasks` are listed and the program ends.

    Raises `UserError` for an unknown one.
    """
    if not arguments or arguments[0] in HELP:
        print(f"usage: minitransformer {command} {'|'.join(tasks)} {operands}\n")
        width = max(map(len, tasks)) + 4
        for name, about in tasks.items():
            first, rest = f"  {name}".ljust(width), " " * width
            print(textwrap.fill(about, WIDTH - 1, initial_indent=first, subsequent_indent=rest))
        raise SystemExit(DONE)
    lookup(f"task of {command}", arguments[0], tasks)
    return arguments[0]


def note(text: str) -> None:
    """Say something beside the results, on standard error."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def check_outputs(outputs: Mapping[str, Path | None], *, new: bool = True) -> None:
    """Raises `UserError` for a file, by its flag, that could not be written after the work, or that must be `new`."""
    taken: set[Path] = set()
    for flag, path in outputs.items():
        if path is None:
            continue
        folder = existing(path.parent)
        why = None
        if new and path.exists():
            why = "already exists"
        elif path.absolute() in taken:
            why = "is named twice"
        elif path.is_dir():
            why = "cannot be written, as it is a folder"
        elif not folder.is_dir():
            why = f"cannot be written, as {folder} is no folder"
        elif not os.access(folder, os.W_OK):
            why = f"cannot be written, as {folder} is read-only"
        if why is not None:
            raise UserError(f"{path} {why}: choose another {flag}")
        taken.add(path.absolute())


def given_flags(arguments: Sequence[str]) -> set[str]:
    """The names of the fields whose flags are among `arguments`."""
    flags = (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.replace("-", "_") for flag in flags}


def joined(arguments: Sequence[str]) -> list[str]:
    """`arguments` with the values of repeated flags, those in `SEVERAL`, joined after the first."""
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


def reads_standard_input(data: DataConfig) -> bool:
    """Whether `-` is among the sources of `data`."""
    return names_standard_input(data.data) or names_standard_input(data.validation_data)


def with_files(data: DataConfig) -> DataConfig:
    """`data` with `-` replaced by a file that holds standard input, and small files by what is in them."""
    sources: dict[str, Any] = {
        "data": without_standard_input(data.data, data.validation_data),
        "validation_data": without_standard_input(data.validation_data, data.data),
    }
    dataset = replace(data.dataset, settings=data.dataset.make().with_contents())
    return replace(data, dataset=dataset, **sources)


def table_width() -> int:
    """The characters of a line on the terminal, within limits."""
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, LEAST_WIDTH), MOST_WIDTH)


def piped_text() -> str:
    """The text on standard input if it is a pipe or a file; empty for a terminal, /dev/null or closed input."""
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
