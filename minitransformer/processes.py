"""Child processes that end with this process, however it ends, together with their own children."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from minitransformer.errors import StorageError, UserError
from minitransformer.plugins import load_plugin, loaded_files

T = TypeVar("T")
R = TypeVar("R")


def processors() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_launched() -> bool:
    """Whether `torchrun`, or another launcher of several ranks, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


class Process:
    """A process that runs `work(remote, *arguments)`, all of it picklable.

    `remote` is the child's end of the pipe `connection`; the process ends when `work` returns or reads
    from the closed pipe. It ignores Ctrl-C, and `environment` is set before it imports anything.
    """

    def __init__(self, work: Callable[..., None], *arguments: object, environment: Mapping[str, str] = {}) -> None:
        context = get_context("spawn")
        self.connection, remote = context.Pipe()
        # Pickled work may refer to classes of plugins, which must be loaded before it is unpickled.
        self._process = context.Process(target=_run, args=(remote, loaded_files(), pickle.dumps((work, arguments))))
        with _block_ctrl_c(), changed_environment(environment):
            self._process.start()
        remote.close()

    def end(self) -> None:
        """Kill it and its children, if they run."""
        if self._process.pid is not None and self._process.exitcode is None and hasattr(os, "killpg"):
            # A process that has just started does not lead a process group yet.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()

    def ending(self) -> str:
        """How it ended, to follow "the process" in a sentence; waits for the end."""
        self._process.join()
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "was killed, as happens when memory runs out"
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


@contextmanager
def _block_ctrl_c() -> Iterator[None]:
    """Let processes started in the block leave Ctrl-C, which reaches all processes of a terminal, to their parent.

    The signal is blocked, not ignored: children inherit that, and a signal that arrives meanwhile is delivered later.
    """
    if not hasattr(signal, "pthread_sigmask"):  # not on this system
        yield
        return
    start_resource_tracker()  # the first process would start it, and it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Start multiprocessing's tracker, which cleans up after killed processes, without a warning for each lock."""
    warnings = f"{os.environ.get('PYTHONWARNINGS', '')},ignore:resource_tracker".lstrip(",")
    with changed_environment({"PYTHONWARNINGS": warnings}):
        resource_tracker.ensure_running()


@contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
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
    """End this process and its children."""
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def one_line(error: BaseException) -> str:
    """The exception and where it was raised, without the traceback."""
    what = traceback.format_exception_only(error)[-1].splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{what} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else what


def in_processes(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map` in `workers` processes, in order, one item ahead for each; with one worker, in this process.

    Items and results are picklable. Raises the `UserError` of an item, or `StorageError` if a process is lost.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool: list[Process] = []
    busy: deque[Process] = deque()
    try:
        for item in items:
            if len(pool) < workers:
                pool.append(process := Process(_answer_each, function))
            else:
                process = busy.popleft()
                yield _answer_of(process)
            process.connection.send(item)
            busy.append(process)
        while busy:
            yield _answer_of(busy.popleft())
    finally:
        for process in pool:
            process.end()


def _answer_of(process: Process) -> Any:
    try:
        answer = process.connection.recv()
    except (EOFError, ConnectionError):
        raise StorageError(f"a worker {process.ending()}: free memory, or give fewer --workers") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _answer_each(remote: connection.Connection, function: Callable[[Any], Any]) -> None:
    while True:
        item = remote.recv()
        try:
            answer = function(item)
        except UserError as error:
            answer = error
        remote.send(answer)
