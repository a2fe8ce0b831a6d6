"""Courses of the learning rate: progress after warm-up, from 0 to 1, to a share of the highest rate."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, int, int], float]


def cosine(progress: float, step: int, warmup_steps: int) -> float:
    """½ (1 + cos(π · progress)). Loshchilov and Hutter 2016 (arXiv 1608.03983), equation 5."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, step: int, warmup_steps: int) -> float:
    """1 − progress."""
    return 1 - progress


def wsd(progress: float, step: int, warmup_steps: int) -> float:
    """Stable, then decay: 1, then linearly to 0 over the last fifth. Hu et al. 2024 (arXiv 2404.06395), section 4."""
    return min(1.0, (1 - progress) / 0.2)


def inverse_sqrt(progress: float, step: int, warmup_steps: int) -> float:
    """√(warmup_steps / step). Vaswani et al. 2017 (arXiv 1706.03762), equation 3, relative to its peak."""
    return math.sqrt(max(warmup_steps, 1) / max(step, warmup_steps, 1))


def constant(progress: float, step: int, warmup_steps: int) -> float:
    """1 throughout."""
    return 1.0


SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "inverse-sqrt": inverse_sqrt,
    "constant": constant,
}


def learning_rate_share(schedule: Schedule, step: int, *, steps: int, warmup_steps: int, floor: float) -> float:
    """The share of the highest learning rate at `step`, counted from 0: a linear warm-up, then from 1 to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return floor + (1 - floor) * schedule(progress, step, warmup_steps)
