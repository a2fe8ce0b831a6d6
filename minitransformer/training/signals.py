"""Ctrl-C and SIGTERM, turned into a request that the training loop reads between steps and between batches."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from minitransformer.training.ranks import Ranks

FAILED = 255
"""above all signals"""


class StopRequest:
    """While entered, the first signal requests a stop, and a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, ranks: Ranks, *, failed: bool = False) -> bool:
        """Whether a stop was requested, or something has `failed`, on any of `ranks`; a request is then on all."""
        most = ranks.largest(FAILED if failed else self.signal or 0)
        if most not in (0, FAILED):
            self.signal = most
        return most > 0

    @property
    def exit_code(self) -> int:
        assert self.signal is not None
        return 128 + self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
