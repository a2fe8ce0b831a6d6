"""Commands, and ranks, that fork from a process that has imported what they need: no seconds of imports for each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from minitransformer.commands import start
from minitransformer.reliability.launcher import Commands, Start

PRELOADED = ["tests.preloaded_for_tests"]


def forked_commands(start: Start = start) -> Commands:
    """Starts `start`, by default the package's commands, alone or on ranks, from the process that all tests share."""
    return Commands(start, PRELOADED)


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m minitransformer WORDS` in the current folder and environment, without standard input."""
    forked_commands()
    context = get_context("forkserver")
    with tempfile.TemporaryDirectory() as notes:
        out, err = Path(notes, "out"), Path(notes, "err")
        process = context.Process(target=_be, args=(words, Path.cwd(), dict(os.environ), out, err))
        process.start()
        process.join()
        code = process.exitcode or 0
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _be(words: Sequence[str], folder: Path, environment: Mapping[str, str], out: Path, err: Path) -> None:
    """In the new process: never returns."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((Path(os.devnull), out, err)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(path, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate(("r", "w", "w")))
    sys.argv = ["minitransformer", *words]
    code = 1
    try:
        from minitransformer.__main__ import main

        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
