"""Ctrl-C and SIGTERM, turned into a request that the training loop reads between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """Raised inside `StopRequest.interruptible` blocks, which are safe to abort."""


class StopRequest:
    """While entered, the first signal requests a stop, and a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._may_interrupt = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be aborted."""
        self._may_interrupt = True
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._may_interrupt = False

    @property
    def exit_code(self) -> int:
        assert self.signal is not None
        return 128 + self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if self._may_interrupt:
            raise Interrupted
