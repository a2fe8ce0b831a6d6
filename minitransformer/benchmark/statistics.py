"""Statistics of interleaved rounds: medians, paired ratios with confidence intervals, and the winner.

Times have long tails, so medians are used, with distribution-free intervals between order statistics
(Conover 1999, Practical Nonparametric Statistics, section 3.2). Ratios are taken within
rounds, so that what slows a whole round, such as other work on the machine, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: ArrayLike) -> Spread:
        low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and its confidence interval.

    Too few rounds for the level give the interval from 0 to ∞.
    """

    median: float
    low: float
    high: float

    def exceeds(self, floor: float = 1.0) -> bool:
        """Whether the whole interval is above `floor`."""
        return self.low > floor


def least_rounds(level: float = LEVEL) -> int:
    """Minimum number of rounds for an interval with confidence `level`."""
    return max(2, math.ceil(1 - math.log2(1 - level)))


def median_interval(values: ArrayLike, level: float = LEVEL) -> Ratio:
    """The median of positive `values`, between the order statistics that hold the true one with at least `level`."""
    ordered = np.sort(np.asarray(values, dtype=float))
    outside = _values_outside(len(ordered), level)
    if outside is None:
        return Ratio(float(np.median(ordered)), 0.0, math.inf)
    return Ratio(float(np.median(ordered)), float(ordered[outside]), float(ordered[-1 - outside]))


def _values_outside(count: int, level: float) -> int | None:
    """Number of values outside the interval at either end; None if there are too few values.

    The true median lies below the k-th of n values with the probability of fewer than k heads in n throws.
    """
    tail, outside = 0.0, None
    for heads in range((count + 1) // 2):
        tail += math.comb(count, heads) / 2**count
        if 2 * tail > 1 - level + 1e-12:
            break
        outside = heads
    return outside


@dataclass(frozen=True)
class Verdict:
    """The winner and its lead over the next; without a winner, the contestants tied with the best."""

    best: str
    winner: bool
    runner_up: str | None = None
    lead: Ratio | None = None
    tied: tuple[str, ...] = ()
    rounds: int = 0
    needed: int = 0

    def __str__(self) -> str:
        if self.runner_up is None:
            return f"there is nothing to compare {self.best} with"
        if self.rounds < self.needed:
            return f"no winner: {self.rounds} rounds are too few, at least {self.needed} are needed"
        if self.winner:
            assert self.lead is not None
            return f"{self.best} wins: {interval_text(self.lead)} times as good as {self.runner_up}"
        return f"no winner: {self.best} and {', '.join(self.tied)} differ by less than the noise"


def compare_rounds(ratios: Mapping[str, ArrayLike], floor: float = 1.0) -> Verdict:
    """Whether the contestant with the best median of `ratios` (name -> [rounds], above 1 is better) is the winner.

    It is if the interval of its paired ratio to every other is above `floor`. The best was chosen on the same data, so
    intervals are Bonferroni-corrected. `floor` is the measured ratio of the base to itself.
    """
    by_name = {name: np.asarray(values, dtype=float) for name, values in ratios.items()}
    best, *others = sorted(by_name, key=lambda name: -float(np.median(by_name[name])))
    if not others:
        return Verdict(best, winner=False)
    level = 1 - (1 - LEVEL) / len(others)
    leads = {name: median_interval(by_name[best] / by_name[name], level) for name in others}
    tied = tuple(name for name in others if not leads[name].exceeds(floor))
    rounds = len(by_name[best])
    return Verdict(best, not tied, others[0], leads[others[0]], tied, rounds, least_rounds(level))


@dataclass(frozen=True)
class Exponent:
    """The p of y ∝ x^p, and its standard error; NaN with fewer than three points."""

    value: float
    error: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Exponent | None:
        """The slope of log y over log x by least squares; None with fewer than two points above zero."""
        points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
        if len({point for point, _ in points}) < 2:
            return None
        logs = np.asarray(points)
        centered = logs - logs.mean(axis=0)
        spread = float(centered[:, 0] @ centered[:, 0])
        slope = float(centered[:, 0] @ centered[:, 1]) / spread
        residual = centered[:, 1] - slope * centered[:, 0]
        degrees = len(points) - 2
        return cls(slope, math.sqrt(float(residual @ residual) / degrees / spread) if degrees else math.nan)

    def __str__(self) -> str:
        return f"{self.value:.2f}" if math.isnan(self.error) else f"{self.value:.2f} ± {self.error:.2f}"


def interval_text(ratio: Ratio) -> str:
    """Median and ends; the median alone if the rounds are too few for an interval."""
    if not math.isfinite(ratio.high):
        return f"{ratio.median:.3g}"
    return f"{ratio.median:.3g} [{ratio.low:.3g}–{ratio.high:.3g}]"
