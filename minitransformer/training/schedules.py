"""Learning-rate schedules: the multiplier of the peak learning rate as a function of progress after warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minitransformer.registry import Registered
from minitransformer.settings import setting


class Schedule(Registered, kind="learning-rate schedule"):
    """A learning-rate schedule after the linear warm-up."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        """The multiplier of the peak at `step`; `progress`, 0 to 1, starts at the end of the warm-up."""
        raise NotImplementedError

    def with_warmup(self, step: int, *, steps: int, warmup_steps: int, floor: float) -> float:
        """The multiplier at `step` of `steps`, counted from 0: linear warm-up, then from 1 to `floor`."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return floor + (1 - floor) * self.multiplier(progress, step, warmup_steps)


class Cosine(Schedule, name="cosine"):
    """½ (1 + cos(π · progress)). Loshchilov and Hutter 2016 (arXiv 1608.03983), equation 5."""

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Schedule, name="linear"):
    """1 − progress."""

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        return 1 - progress


class WarmupStableDecay(Schedule, name="wsd"):
    """1, then linear decay to 0 over the last `decay` of the steps. Hu et al. 2024 (arXiv 2404.06395), section 4."""

    @dataclass(frozen=True)
    class Settings:
        decay: float = setting(
            0.2, above=0, at_most=1, help="fraction of the steps after warm-up in which the learning rate decays"
        )

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        return min(1.0, (1 - progress) / self.settings.decay)


class InverseSqrt(Schedule, name="inverse-sqrt"):
    """√(warmup_steps / step). Vaswani et al. 2017 (arXiv 1706.03762), equation 3, relative to its peak."""

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        return math.sqrt(max(warmup_steps, 1) / max(step, warmup_steps, 1))


class Constant(Schedule, name="constant"):
    """1 throughout."""

    def multiplier(self, progress: float, step: int, warmup_steps: int) -> float:
        return 1.0
