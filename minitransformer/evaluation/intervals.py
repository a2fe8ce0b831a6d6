"""Macro F1, and 95% confidence intervals of metrics over independent texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Bounds = tuple[float, float]
Z = 1.959964
"""97.5% quantile of the normal distribution"""
RESAMPLES = 1000
MOST_NUMBERS = 1 << 22
"""of resampled counts in memory at a time"""


def wilson_interval(correct: float, count: int) -> Bounds:
    """The score interval of a fraction. Wilson 1927, "Probable inference, the law of succession"."""
    fraction, z2 = correct / count, Z * Z / count
    middle, half = fraction + z2 / 2, Z * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def f1_scores(confusion: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[..., classes] F1 of each class of `confusion` [..., classes, predicted classes]; 0/0 is 0."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return 2 * right / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)


def macro_f1(confusion: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """[...] the mean of F1 over the classes of `confusion`."""
    return f1_scores(confusion).mean(-1)


def bootstrap_interval(statistic: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], confusion: Counts) -> Bounds:
    """The percentile interval of a `statistic` of texts that are drawn again with replacement.

    Efron 1979, "Bootstrap methods". It is always the same for the same counts.
    """
    generator, count = np.random.default_rng(0), int(confusion.sum())
    cells = confusion.ravel() / count
    size = max(1, min(RESAMPLES, MOST_NUMBERS // len(cells)))
    values: list[float] = []
    while len(values) < RESAMPLES:
        drawn = generator.multinomial(count, cells, min(size, RESAMPLES - len(values)))
        values += statistic(drawn.reshape(-1, *confusion.shape)).tolist()
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
