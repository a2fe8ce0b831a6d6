"""Contestants in separate processes, so that they share no allocator, threads, caches or compiled code."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing import connection
from typing import Any

from minitransformer.benchmark.case import Cost, Work
from minitransformer.errors import UserError
from minitransformer.processes import Process, one_line

NO_TIME = "it would exceed --minutes: give more, or select by --only and --contestants"


class ContestantFailed(Exception):
    """A contestant that failed, and why, in one line."""


class TimeUp(ContestantFailed):
    """A contestant that exceeded its time."""

    def __init__(self, why: str = NO_TIME) -> None:
        super().__init__(why)


class Worker:
    """The process of a contestant, idle between samples. It ends with this process."""

    def __init__(self, prepare: Callable[[], Work]) -> None:
        self._process = Process(_serve, prepare)

    def cost(self, deadline: float = math.inf) -> Cost | None:
        """The cost of a unit of its work, once prepared; raises `ContestantFailed`, and `TimeUp` after
        `deadline`, a time of `time.monotonic`."""
        return self._receive(deadline)

    def sample(self, deadline: float = math.inf) -> float:
        """One measurement; raises `ContestantFailed`, and `TimeUp`, after which it can only be closed."""
        with suppress(OSError):  # if it was killed, this is noticed on receive
            self._process.connection.send("sample")
        return self._receive(deadline)

    def close(self) -> None:
        """End the process and its children."""
        self._process.end()

    def _receive(self, deadline: float) -> Any:
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        try:
            if not self._process.connection.poll(left):
                raise TimeUp
            kind, answer = self._process.connection.recv()
        except (EOFError, OSError):
            raise ContestantFailed(f"its process {self._process.ending()}") from None
        if kind == "failed":
            raise ContestantFailed(answer)
        return answer


def measured_alone(prepare: Callable[[], Work], samples: int = 1) -> float:
    """The largest of some samples in a separate process; raises `ContestantFailed`."""
    with closing(Worker(prepare)) as worker:
        worker.cost()
        return max(worker.sample() for _ in range(samples))


def _serve(remote: connection.Connection, prepare: Callable[[], Work]) -> None:
    try:
        _be_quiet()
        work = prepare()
        remote.send(("ready", work.cost))
        while remote.recv():
            remote.send(("sample", work.sample()))
    except BaseException as error:
        remote.send(("failed", str(error) if isinstance(error, UserError) else one_line(error)))


def _be_quiet() -> None:
    """Discard the output of contestants, which would disturb the table."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def repeated(once: Callable[[], object], units: float, seconds: float, finish: Callable[[], object]) -> float:
    """Units per second of `once`, repeated for at least `seconds`; `finish` synchronises with the device."""
    count, start = 0, time.perf_counter()
    while True:
        once()
        count += 1
        if time.perf_counter() - start >= seconds:
            finish()
            return count * units / (time.perf_counter() - start)


def peak_megabytes(of_children: bool = False) -> float:
    """Peak resident memory of this process, or of its largest finished child, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere
