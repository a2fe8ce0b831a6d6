"""Commands that start at once, each in a process of its own that may be killed, or find what a disk may answer.

`python -m tests.faults_for_tests` imports what commands need and then forks for each line of JSON that it reads: one
thread and no lock, so that a fork is safe, and no second of imports for each of hundreds of commands.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
KILLED, TRACEBACK = -signal.SIGKILL, 99
# Calls that change what is on disk, and those after which it stays.
CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "symlink", "chmod")


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is negative for the signal that ended it."""

    code: int
    output: str
    calls: int
    """how many changes of the disk it has made, if it was not killed"""

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


class Commands:
    """Starts commands in a folder, by way of a process that has imported all they need."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self,
        folder: Path,
        command: str,
        *arguments: str,
        at: int = 0,
        fault: str = "kill",
        kill_after: float | None = None,
    ) -> Ended:
        """Run `command` in `folder`, with the `fault` at its call number `at` that changes the disk.

        Or kill it after `kill_after` seconds.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"folder": str(folder), "command": command, "arguments": arguments}
        print(json.dumps({**job, "at": at, "fault": fault, "kill_after": kill_after}), file=self._server.stdin)
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()


@contextmanager
def commands() -> Iterator[Commands]:
    """For as long as the block lasts."""
    starter = Commands()
    try:
        yield starter
    finally:
        starter.close()


def _serve() -> None:
    import filelock  # noqa: F401  (imported for those that fork)
    import torch

    from minitransformer.commands import compare, sample, train  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as notes:
        for line in sys.stdin:
            print(json.dumps(_run(json.loads(line), Path(notes))), flush=True)


def _run(job: dict[str, Any], notes: Path) -> dict[str, Any]:
    output, calls = notes / "output", notes / "calls"
    output.write_text("")
    calls.write_text("0")
    child = os.fork()
    if child == 0:
        _work(job, output, calls)
    end = None if job["kill_after"] is None else time.monotonic() + job["kill_after"]
    while end is not None and time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.001)
    if end is not None:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {
        "code": code,
        "output": output.read_text(errors="replace"),
        "calls": int(calls.read_text()),
    }


def _work(job: dict[str, Any], output: Path, calls: Path) -> None:
    """In the child: never returns."""
    from minitransformer.commands import start

    code = TRACEBACK
    counter = Counter(job["at"], job["fault"])
    try:
        os.chdir(job["folder"])
        os.environ["MINITRANSFORMER_DATA"] = str(Path(job["folder"]) / "work")
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
        sys.stdin = io.TextIOWrapper(io.BytesIO())
        counter.count()
        code = start(job["command"], job["arguments"])
        calls.write_text(str(counter.calls))
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Counter:
    """Counts this process's changes of the disk, and has the fault at one of them."""

    def __init__(self, at: int, fault: str) -> None:
        self.calls, self._at = 0, at
        self._lock = threading.Lock()  # checkpoints are written by a thread
        self._fault = {"kill": _kill, "fill": _fill, "vanish": _vanish}[fault]

    def count(self) -> None:
        # What a killed process has written is on disk, synced or not; the machine stays up.
        os.fsync = lambda descriptor: None
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.calls += 1
                now = self.calls == self._at
            if now:
                self._fault()
            return function(*arguments, **named)

        return called


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill() -> None:
    """Leave no room on the disk of this folder."""
    with suppress(OSError), open("ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _vanish() -> None:
    shutil.rmtree("run")


def flip(path: Path, place: int, bit: int) -> None:
    """Change one bit of the file at `path`."""
    with path.open("rb+") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def all_files(folders: Sequence[Path]) -> list[Path]:
    """The files below `folders` that hold something, each once, in order."""
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted({path.resolve() for path in found})


if __name__ == "__main__":
    _serve()
