"""Commands in processes of their own, which fork from one that has imported torch: no second of imports for each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from minitransformer.processes import changed_environment

ROOT = Path(__file__).parents[1]
IMPORTED = ["minitransformer.commands.train", "minitransformer.commands.sample"]


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m minitransformer WORDS` in the current folder and environment, without standard input."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as notes, changed_environment({"PYTHONPATH": path}):
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
