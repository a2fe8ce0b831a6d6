"""A pool of single-threaded processes that measure tasks, and end with their parent."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from minitransformer.errors import UserError
from minitransformer.processes import Process, one_line
from minitransformer.tasks.task import Measurement, MeasureTask, Task

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""environment, set before they import torch"""


@dataclass(frozen=True)
class TaskOutcome:
    """The outcome of a task: its measurement, or one line on why it failed."""

    task: Task
    measured: Measurement | None
    failure: str = ""
    mendable: bool = False
    """whether the failure was a `UserError`"""
    seconds: float = 0.0


def outcomes(tasks: Iterable[Task], measure: MeasureTask, processes: int) -> Generator[TaskOutcome]:
    """The outcomes of tasks, in order of completion, measured by `processes` processes.

    `measure` must be picklable: a function of a module, or a `functools.partial` of one. A process that
    is killed fails its task, and is replaced. Closing the iterator kills the processes; they
    also end when this process is killed.
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
                    worker.process.end()
                if outcome is not None:
                    yield outcome
    finally:
        for worker in workers.values():
            worker.process.end()


class _Worker:
    """A process and its current task. It reports when it is ready, and then the outcome of each task."""

    def __init__(self, measure: MeasureTask) -> None:
        self.process = Process(_work, measure, environment=ONE_THREAD)
        self.connection = self.process.connection
        self.task: Task | None = None
        self.dead = False

    def give(self, task: Task) -> None:
        self.task = task
        # If it was just killed, this is noticed on receive.
        with suppress(OSError):
            self.connection.send(task)

    def receive(self) -> TaskOutcome | None:
        """The outcome of the task; None from a process that has just started."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return self._failed_outcome()

    def _failed_outcome(self) -> TaskOutcome:
        self.dead = True
        ending = self.process.ending()
        self.process.end()
        if self.task is None:
            raise RuntimeError(f"a process of the pool {ending} before it had a task")
        return TaskOutcome(self.task, None, f"its process {ending}")


def _work(remote: connection.Connection, measure: MeasureTask) -> None:
    """The main function of a process: measure tasks until there are none."""
    outcome = None
    while True:
        remote.send(outcome)
        outcome = _outcome(measure, remote.recv())


def _outcome(measure: MeasureTask, task: Task) -> TaskOutcome:
    start = time.perf_counter()
    try:
        # Through JSON, so that results are the same now and after a restart.
        measured = json.loads(json.dumps(dict(measure(task))))
    except UserError as error:
        return TaskOutcome(task, None, str(error), mendable=True)
    except Exception as error:
        return TaskOutcome(task, None, one_line(error))
    return TaskOutcome(task, measured, seconds=time.perf_counter() - start)
