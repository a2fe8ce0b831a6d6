"""Ctrl-C, SIGTERM and Slurm's notice as a request, which the training loop reads between steps and batches."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from minitransformer.training.ranks import Ranks
from minitransformer.training.watch import NOTICE

FAILED = 255
"""above all signals"""


class StopRequest:
    """While entered, the first signal requests a stop, and a second one interrupts at once; a notice never does."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, NOTICE):
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
        return 128 + (signal.SIGTERM if self.signal == NOTICE else self.signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A stop that other ranks have requested may be known before this process gets the signal that they all get.
        if self._received and number != NOTICE:
            raise KeyboardInterrupt
        self._received |= number != NOTICE
        self.signal = self.signal or number
