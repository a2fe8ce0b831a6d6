"""Faults that a process finds at a change of the disk: a kill, a full disk, a limit on files, a folder that is gone."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# Calls that change what is on disk, and those after which it stays.
CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "symlink", "chmod")
BALLAST = "ballast"
"""file that fills the disk"""


class DiskFault:
    """Counts the changes of the disk by this process, and has a fault at number `at`, which 0 never is.

    The fault is one of "kill", "fill", "limit" and "vanish".
    """

    def __init__(self, at: int, fault: str, size: int = 0) -> None:
        self.calls, self._at = 0, at
        self._lock = threading.Lock()  # checkpoints may be written by a thread
        faults = {"kill": kill, "fill": fill_disk, "limit": lambda: limit_files(size), "vanish": remove_run}
        self._fault: Callable[[], None] = faults[fault]

    def inject(self) -> None:
        """Have the fault in this process, which is to end after the command."""
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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """Leave no room on the disk of this folder."""
    with suppress(OSError), open(BALLAST, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def limit_files(size: int) -> None:
    """Have every file end after `size` bytes, as on a disk that is full."""
    import resource  # not on every system

    # Python ignores the signal, so that a write raises an error.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def remove_run() -> None:
    shutil.rmtree("run")
