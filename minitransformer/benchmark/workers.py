"""Contestants in processes of their own, so that none has another's allocator, threads, caches or compiled code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process, resource_tracker
from threading import Thread
from typing import Any

from minitransformer.benchmark.case import Cost, Work
from minitransformer.errors import UserError


class ContestantFailed(Exception):
    """A contestant that cannot be measured, and why, in one line."""


class Worker:
    """The process of a contestant, which waits between its samples. It ends with this process, however that ends."""

    def __init__(self, prepare: Callable[[], Work]) -> None:
        context = get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_work, args=(remote, prepare))
        with _deaf_to_ctrl_c():
            self._process.start()
        remote.close()

    def cost(self) -> Cost | None:
        """What a unit of its work asks of the machine, once it is ready; raises `ContestantFailed`."""
        return self._receive()

    def sample(self) -> float:
        """One measurement; raises `ContestantFailed`."""
        with suppress(OSError):  # that it was killed is seen when its answer is awaited
            self._connection.send("sample")
        return self._receive()

    def close(self) -> None:
        """End the process and those that it started."""
        if self._process.pid is not None and self._process.exitcode is None and hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # it has just begun, and leads no group yet
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ContestantFailed(f"its process {_ending(self._process.exitcode)}") from None
        if kind == "failed":
            raise ContestantFailed(answer)
        return answer


def _ending(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed, as happens when memory runs out"
    return f"ended with exit code {exit_code}"


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that start here leave Ctrl-C, which goes to all of a terminal at once, to the one that ends them.

    It is blocked and not ignored: children inherit that too, and one that comes meanwhile is heard afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # a system without them
        yield
        return
    _start_tracker()  # the first process would start it, and that lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Of what killed processes leave to be cleaned up, such as locks; by default, it warns of each."""
    before = os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = f"{before},ignore:resource_tracker".lstrip(",")
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ["PYTHONWARNINGS"] = before


def _work(remote: connection.Connection, prepare: Callable[[], Work]) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        _be_quiet()
        work = prepare()
        remote.send(("ready", work.cost))
        while remote.recv():
            remote.send(("sample", work.sample()))
    except (EOFError, BrokenPipeError):
        _end_group()
    except BaseException as error:
        with suppress(OSError):
            remote.send(("failed", _in_one_line(error)))


def _be_quiet() -> None:
    """What contestants, their libraries and their children print would stand in the middle of the table."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    _end_group()


def _end_group() -> None:
    """End this process, and those that it started."""
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    last = traceback.format_exception_only(error)[-1].splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{last} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else last


def repeated(once: Callable[[], object], units: float, seconds: float, finish: Callable[[], object]) -> float:
    """Units a second of `once`, done as often as it takes to fill `seconds`; `finish` waits for the device."""
    count, start = 0, time.perf_counter()
    while True:
        once()
        count += 1
        if time.perf_counter() - start >= seconds:
            finish()
            return count * units / (time.perf_counter() - start)


def peak_megabytes(of_children: bool = False) -> float:
    """The highest resident memory that this process, or the largest of its ended children, has had, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere
