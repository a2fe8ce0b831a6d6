"""Commands that start at once, on one rank or several, each of which may be killed, stopped, or find a broken disk.

A process that has imported what commands need forks for each of them: no second of imports for hundreds of commands.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from minitransformer.processes import changed_environment, start_resource_tracker
from minitransformer.reliability.injection import DiskFault

Start = Callable[[str, Sequence[str]], int]
"""runs the command of this name with arguments, and returns its exit code"""
ROOT = Path(__file__).parents[2]
OF_RANKS = ("filelock", "torch.nn.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint")
"""what commands import late"""
KILLED, TRACEBACK = -signal.SIGKILL, 99
ENDED_BY_OTHERS = {KILLED, -signal.SIGTERM}


@dataclass(frozen=True)
class Strike:
    """What happens to `rank` of a command, or to all: a signal after some seconds, or a fault of its disk."""

    rank: int | None = None
    after: float | None = None
    """seconds from the start, or from the time when `once` is there, to the signal"""
    signal: int = signal.SIGKILL
    once: Path | None = None
    at: int = 0
    """number of the change of the disk at which it has the fault"""
    fault: str = "kill"
    size: int = 0
    """of the fault "limit": the size of the largest file"""

    def hits(self, rank: int) -> bool:
        return self.rank is None or self.rank == rank


NOTHING = Strike()


@dataclass(frozen=True)
class Ended:
    """How each rank of a command ended: `codes` are negative for the signal that ended it, None if it hung."""

    codes: list[int | None]
    outputs: list[str]
    calls: list[int]
    """how many changes of the disk each has made, if it was not killed"""
    seconds: float

    @property
    def code(self) -> int | None:
        """The exit code of rank 0."""
        return self.codes[0]

    @property
    def output(self) -> str:
        return "".join(self.outputs)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    @property
    def done(self) -> bool:
        return set(self.codes) == {0}

    @property
    def in_one_sentence(self) -> bool:
        """Whether the ranks that were not killed refused to go on, in one sentence without a traceback."""
        refused = [code for code in self.codes if code not in ENDED_BY_OTHERS]
        one = bool(refused) and set(refused) <= {1, 2} and len(set(self.errors)) == 1
        return one and "Traceback" not in self.output


class Commands:
    """Starts commands by way of `start`, from a process that has imported `modules`."""

    def __init__(self, start: Start, modules: Sequence[str]) -> None:
        self._start = start
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([*modules, *OF_RANKS])
        start_resource_tracker()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with changed_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": path}):
            forkserver.ensure_running()

    def __call__(
        self, folder: Path, *words: str, ranks: int = 1, strike: Strike = NOTHING, patience: float = 60
    ) -> Ended:
        """Run the command `words` in `folder`; what takes more than `patience` seconds is killed, and has hung."""
        with tempfile.TemporaryDirectory() as notes:
            begun = time.monotonic()
            works = [RankWork(folder, words, rank, ranks, strike, Path(notes)) for rank in range(ranks)]
            with _Processes(self._context, self._start, works) as processes:
                codes = processes.codes(strike, begun + patience)
            seconds = time.monotonic() - begun
            outputs = [work.output.read_text(errors="replace") for work in works]
            calls = [
                int(work.calls.read_text() or 0) for work in works
            ]  # of a rank that is ended as it writes, nothing
            return Ended(codes, outputs, calls, seconds)


@dataclass(frozen=True)
class RankWork:
    """The part of one rank in a command."""

    folder: Path
    words: Sequence[str]
    rank: int
    ranks: int
    strike: Strike
    notes: Path

    @property
    def output(self) -> Path:
        return self.notes / f"output-{self.rank}"

    @property
    def calls(self) -> Path:
        return self.notes / f"calls-{self.rank}"

    def environment(self, port: int) -> dict[str, str]:
        """What `torchrun` would set, and the place of prepared data."""
        own = {"MINITRANSFORMER_DATA": str(self.folder / "work")}
        if self.ranks == 1:
            return own
        rank, ranks = str(self.rank), str(self.ranks)
        own |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": "0"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_WORLD_SIZE": "1"}
        return own | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


class _Processes:
    """The processes of a command's ranks, and one with the store by which they find each other."""

    def __init__(self, context: object, start: Start, works: Sequence[RankWork]) -> None:
        self._context, self._start, self._works = context, start, works
        self._all: list[BaseProcess] = []

    def __enter__(self) -> _Processes:
        port = self._host() if len(self._works) > 1 else 0
        for work in self._works:
            work.output.write_text("")
            work.calls.write_text("0")
            self._begin(_work, self._start, work, port)
        return self

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        process = self._context.Process(target=target, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self._all.append(process)
        process.start()

    def _host(self) -> int:
        here, there = self._context.Pipe()  # type: ignore[attr-defined]
        self._begin(_host_store, there)
        port: int = here.recv()
        return port

    def __exit__(self, *exception: object) -> None:
        for process in self._all:
            process.kill()
            process.join()

    def codes(self, strike: Strike, end: float) -> list[int | None]:
        """The exit code of each rank, after `strike`; None for those that do not end."""
        ranks = self._all[-len(self._works) :]
        targets = [process for rank, process in enumerate(ranks) if strike.hits(rank)]
        _strike(targets, strike, ranks, end)
        stopped = targets if strike.signal == signal.SIGSTOP else []
        waiting = [process for process in ranks if process not in stopped]
        while any(process.is_alive() for process in waiting) and time.monotonic() < end:
            # As `torchrun` does; but those that were struck are on another node, whose end is not seen here.
            if any(process.exitcode for process in waiting if process not in targets or strike is NOTHING):
                for process in ranks:
                    process.terminate()
            time.sleep(0.01)
        return [KILLED if each in stopped and each.exitcode is None else each.exitcode for each in ranks]


def _strike(targets: Sequence[BaseProcess], strike: Strike, ranks: Sequence[BaseProcess], end: float) -> None:
    """Send the signal of `strike` at its time, unless all ranks end before."""
    if strike.after is None:
        return
    due = time.monotonic() + strike.after
    there = strike.once is None
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if not there and strike.once is not None and strike.once.exists():
            there, due = True, time.monotonic() + strike.after
        if there and time.monotonic() >= due:
            for process in targets:
                if process.is_alive() and process.pid is not None:
                    with suppress(ProcessLookupError):  # it has ended since
                        os.kill(process.pid, strike.signal)
            return
        time.sleep(0.001)


def _host_store(remote: Connection) -> None:
    """What the agent of `torchrun` does: keep the store until this process is killed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    remote.send(store.port)
    while True:
        signal.pause()


def _work(start: Start, work: RankWork, port: int) -> None:
    """In the process of a rank: never returns."""
    import torch

    strike, code = work.strike, TRACEBACK
    disk = DiskFault(strike.at if strike.hits(work.rank) else 0, strike.fault, strike.size)
    try:
        os.setsid()  # Ctrl-C is for the campaign
        torch.set_num_threads(1)
        os.chdir(work.folder)
        os.environ.update(work.environment(port))
        for stream in (1, 2):
            os.dup2(os.open(work.output, os.O_WRONLY | os.O_APPEND), stream)
        sys.stdin = io.TextIOWrapper(io.BytesIO())
        disk.inject()
        code = start(work.words[0], work.words[1:])
        work.calls.write_text(str(disk.calls))
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
