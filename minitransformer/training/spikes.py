"""What follows a divergence of training: an end of the run, or a rollback to a checkpoint from before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitransformer.registry import Registered
from minitransformer.settings import setting


class SpikePolicy(Registered, kind="spike policy"):
    """What follows a divergence; this base class finds no spike in finite losses, and never goes back."""

    patience: float = math.inf
    """steps in a row with a loss far above those before that are a spike"""
    window = 0
    """number of losses that the next one is compared with"""
    margin = 0
    """steps before a divergence from which the checkpoint to go back to should be, at least"""
    limit = 0
    """most rollbacks of a run"""
    spare_checkpoints = 0
    """most checkpoints that are kept to go back to"""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def is_high(self, loss: float, recent: Sequence[float]) -> bool:
        """Whether `loss` is far above the `recent` losses."""
        return False

    def needed_before(self, start: int, save_every: int) -> set[int]:
        """The steps before which a checkpoint must be kept, for a divergence that begins at step `start` or later."""
        return set()


class Stop(SpikePolicy, name="stop"):
    """End the run with exit code 3 after too many steps without an update; spikes of a finite loss end nothing."""


class Rollback(SpikePolicy, name="rollback"):
    """Go back to a checkpoint from before the divergence, and skip the data up to its end.

    A divergence is also a spike: in `patience` steps in a row, the loss is above μ + `deviations` · σ, the mean and
    the standard deviation of the last `window` losses before. Restart about 100 steps before a spike and skip the data
    seen before and during it: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 5.1. Seven standard deviations:
    the spike score of OLMo 2 (arXiv 2501.00656).
    """

    spare_checkpoints = 3

    @dataclass(frozen=True)
    class Settings:
        deviations: float = setting(
            7.0, above=0, help="standard deviations above the mean of recent losses from which a loss is high"
        )
        window: int = setting(100, at_least=2, most=10_000, help="number of recent losses, without high ones")
        patience: int = setting(5, at_least=1, help="high losses in a row that are a spike")
        margin: int = setting(
            100, at_least=0, help="steps before a spike that the checkpoint to go back to should be, at least"
        )
        limit: int = setting(10, at_least=1, help="most rollbacks; the next divergence ends the run with exit code 3")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.patience, self.window = settings.patience, settings.window
        self.margin, self.limit = settings.margin, settings.limit

    def needed_before(self, start: int, save_every: int) -> set[int]:
        # The last one, one that is `margin` steps older than `start`, and one that will be: intervals keep them few.
        interval = -(-max(1, self.margin) // save_every) * save_every
        old = (start - self.margin - 1) // interval * interval
        return {start, old + 1, (start - 1) // interval * interval + 1}

    def is_high(self, loss: float, recent: Sequence[float]) -> bool:
        if len(recent) < self.window:
            return False
        mean = math.fsum(recent) / len(recent)
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in recent) / len(recent))
        high: bool = loss > mean + self.settings.deviations * deviation
        return high
