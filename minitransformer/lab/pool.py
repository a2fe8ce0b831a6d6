"""Tasks measured in processes of one thread each, which end with the process that started them."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any

from minitransformer.errors import UserError
from minitransformer.lab.experiment import Measurement, Task

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
PATIENCE = 5.0
"""seconds that a process has to end by itself when there is nothing left to do"""

Measure = Callable[[Task], Measurement]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its measurement, or in one line why there is none."""

    task: Task
    measured: Measurement | None
    failure: str = ""
    mendable: bool = False
    """whether the user can mend the failure: it was a `UserError`"""
    seconds: float = 0.0


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def outcomes(tasks: Iterable[Task], measure: Measure, processes: int) -> Generator[Outcome]:
    """What became of each task, as it becomes known, measured by `processes` processes.

    `measure` must be picklable by reference: a function of a module, or a `functools.partial` of one. A process that
    is killed fails its task, and another takes its place. Closing the iterator kills what still runs; the processes
    also end when this one is killed.
    """
    queue = deque(tasks)
    workers: dict[Any, _Worker] = {}  # by connection

    def start() -> None:
        worker = _Worker(measure)
        workers[worker.connection] = worker

    try:
        for _ in range(min(processes, len(queue))):
            start()
        while workers:
            for ready in connection.wait(list(workers)):
                worker = workers[ready]
                outcome = worker.receive()
                if worker.dead:
                    del workers[ready]
                    if queue:
                        start()
                elif queue:
                    worker.give(queue.popleft())
                else:
                    del workers[ready]
                    worker.dismiss()
                if outcome is not None:
                    yield outcome
    finally:
        for worker in workers.values():
            worker.kill()


class _Worker:
    """A process, and the task that it has. It says when it is ready, and after that what became of each task."""

    def __init__(self, measure: Measure) -> None:
        context = get_context("spawn")
        self.connection, remote = context.Pipe()
        self.process = context.Process(target=_work, args=(remote, measure))
        self.task: Task | None = None
        self.dead = False
        with _as_workers_start():
            self.process.start()
        remote.close()

    def give(self, task: Task) -> None:
        self.task = task
        # Whether it was killed just now is seen when its answer is awaited.
        with suppress(OSError):
            self.connection.send(task)

    def receive(self) -> Outcome | None:
        """What became of the task, and None from a process that has just started."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return self._bury()

    def _bury(self) -> Outcome:
        self.dead = True
        self.kill()
        if self.task is None:
            raise RuntimeError(f"a process of the pool {_ending(self.process.exitcode)} before it had a task")
        return Outcome(self.task, None, f"its process {_ending(self.process.exitcode)}")

    def dismiss(self) -> None:
        """Let the process end by itself."""
        self.connection.close()
        self.process.join(PATIENCE)
        self.kill()

    def kill(self) -> None:
        """End the process and those that it started."""
        if hasattr(os, "killpg") and self.process.pid is not None and self.process.exitcode is None:
            with suppress(ProcessLookupError):  # it has just begun, and leads no group yet
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"was killed by {name}" + (" (as happens when memory runs out)" if name == "SIGKILL" else "")
    return f"ended with exit code {exit_code}"


@contextmanager
def _as_workers_start() -> Iterator[None]:
    """What processes inherit that start here: one thread, set before they import torch, and no ear for Ctrl-C.

    Ctrl-C goes to all processes of a terminal at once, while they start too; it is for the parent to end them.
    """
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.signal(signal.SIGINT, handler)


def _work(remote: connection.Connection, measure: Measure) -> None:
    """What a process does: it asks for tasks until there are none."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    Thread(target=_end_with_parent, daemon=True).start()
    outcome = None
    while True:
        try:
            remote.send(outcome)
            task = remote.recv()
        except (EOFError, OSError):
            return
        outcome = _outcome(measure, task)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _outcome(measure: Measure, task: Task) -> Outcome:
    start = time.perf_counter()
    try:
        # As it will be read again: what is concluded now and after a restart is the same.
        measured = json.loads(json.dumps(dict(measure(task))))
    except UserError as error:
        return Outcome(task, None, str(error), mendable=True)
    except Exception as error:
        return Outcome(task, None, _last_line(error))
    return Outcome(task, measured, seconds=time.perf_counter() - start)


def _last_line(error: Exception) -> str:
    """Of the traceback, with the place."""
    what = traceback.format_exception_only(error)[-1].splitlines()[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{what} ({os.path.basename(place.filename)}, line {place.lineno})"
