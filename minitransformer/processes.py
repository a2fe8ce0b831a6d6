"""Processes beside this one, which end when it ends, however that ends, and with them those that they start."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path
from threading import Thread

from minitransformer.plugins import load_plugin, loaded_files


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Process:
    """A process that runs `work(remote, *arguments)`, all of it picklable.

    `remote` is the other end of the pipe whose end here is `connection`; the process ends when `work` returns or asks
    for more from a pipe that is closed. It leaves Ctrl-C to us, and has `environment` before it imports anything.
    """

    def __init__(self, work: Callable[..., None], *arguments: object, environment: Mapping[str, str] = {}) -> None:
        context = get_context("spawn")
        self.connection, remote = context.Pipe()
        # What it is to do may name variants of plugins, which it has to load before it can read that.
        self._process = context.Process(target=_run, args=(remote, loaded_files(), pickle.dumps((work, arguments))))
        with _deaf_to_ctrl_c(), _environment(environment):
            self._process.start()
        remote.close()

    def end(self) -> None:
        """Kill it and those that it started, if they run."""
        if self._process.pid is not None and self._process.exitcode is None and hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # it has just begun, and leads no group yet
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()

    def ending(self) -> str:
        """What became of it, as a sentence goes on after "the process": waits until it is over."""
        self._process.join()
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "was killed, as happens when memory runs out"
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that start here leave Ctrl-C, which goes to all of a terminal at once, to the one that ends them.

    It is blocked and not ignored: children inherit that too, and one that comes meanwhile is heard afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # a system without them
        yield
        return
    # The first process would start the tracker, and that lifts the block. The tracker cleans up what killed processes
    # leave, such as locks, and by default it warns of each.
    warnings = f"{os.environ.get('PYTHONWARNINGS', '')},ignore:resource_tracker".lstrip(",")
    with _environment({"PYTHONWARNINGS": warnings}):
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(remote: connection.Connection, plugins: Sequence[str], task: bytes) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    Thread(target=_end_with_parent, daemon=True).start()
    for path in plugins:
        load_plugin(Path(path))
    work, arguments = pickle.loads(task)
    with suppress(EOFError, OSError):  # the pipe is closed
        work(remote, *arguments)
    _end_group()


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


def one_line(error: BaseException) -> str:
    """What was raised and where, without the rest of the traceback."""
    what = traceback.format_exception_only(error)[-1].splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{what} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else what
