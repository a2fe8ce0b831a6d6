"""Statistics over seeds: means, paired differences and slopes with confidence intervals.

Runs with the same seed share initialisation and batches, so differences are paired by seed.
Intervals are Student's t: the mean ± t · s / √n, with s the sample's standard deviation and n − 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from minitransformer.errors import UserError

LEVEL = 0.95
"""confidence level of intervals, and one minus the significance level"""
FEWEST_SEEDS = 5
"""minimum number of paired seeds to name a winner or decide a claim"""
MOST_RIVALS = 3
"""maximum number of rivals that are listed by name"""


@dataclass(frozen=True)
class Interval:
    """The mean of `n` values, and its confidence interval.

    The interval of a single value is from −∞ to ∞.
    """

    mean: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether `value` is outside the interval; False for a NaN interval, as after divergence."""
        return value < self.low or value > self.high

    def __str__(self) -> str:
        """Mean and ends, to two digits of half the interval; the mean alone if the ends are unknown."""
        reach = self.high - self.mean
        if not math.isfinite(reach) or reach <= 1e-12 * abs(self.mean):  # below is rounding
            return f"{self.mean:.4g}"
        decimals = decimals_of(reach)
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def decimals_of(reach: float) -> int:
    """The number of decimals that show two digits of `reach`, half of an interval (GUM 7.2.6)."""
    return max(0, 1 - math.floor(math.log10(reach)))


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """The mean of `values` (one per seed) with its t interval; raises `ValueError` without values, and `UserError`
    without scipy."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values have shape {array.shape}: a mean needs a vector of at least one value")
    if array.size == 1:
        return Interval(float(array[0]), -math.inf, math.inf, 1)
    (interval,) = _intervals(array[None], level)
    return interval


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """The mean of `a − b`, seed by seed, with its t interval; raises `UserError` for fewer than two seeds, or without
    scipy, and `ValueError` where the lengths differ."""
    return mean_interval(_differences(a, b), level)


def loglog_slope(x: ArrayLike, ys_by_seed: ArrayLike, level: float = LEVEL) -> Interval:
    """The exponent p of y ∝ x^p: the slope of log y over log x by least squares, for each seed (row) of `ys_by_seed`
    (seeds × points), and its t interval over seeds.

    Raises `ValueError` for values that have no logarithm and for fewer than two different x.
    """
    points, ys = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(ys_by_seed, dtype=float))
    if ys.shape[1:] != points.shape:
        raise ValueError(f"ys_by_seed has shape {ys.shape} for {points.shape} points: one column for each x")
    if not (points > 0).all() or not (ys > 0).all():
        raise ValueError("a power law is fitted to positive values only: leave the others out")
    if np.unique(points).size < 2:
        raise ValueError("a slope needs at least two different x")
    centered = np.log(points) - np.log(points).mean()
    return mean_interval(np.log(ys) @ centered / (centered @ centered), level)


def p_value(values: ArrayLike) -> float:
    """The p-value of the two-sided t test that the mean of `values`, such as paired differences, is 0; 1 for fewer than
    two or non-finite values. Raises `UserError` without scipy."""
    array = np.asarray(values, dtype=float)
    return 1.0 if array.size < 2 else _p_values(array[None])[0]


def p_text(p: float) -> str:
    """A p-value with three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for multiple testing, with family-wise error rate α.

    Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Two names, the paired difference first − second, and the p-value of no difference, adjusted for all pairs."""

    first: str
    second: str
    difference: Interval
    p: float


@dataclass(frozen=True)
class Ranking:
    """Names ordered by mean, best first, all pairs, and the winner, if there is a significant one."""

    order: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    winner: str | None
    level: float
    seeds: int
    smallest: float = 0.0
    """smallest difference that names a winner"""

    def __str__(self) -> str:
        best, *others = self.order
        if not others:
            return f"There is nothing to compare {best} with."
        if self.seeds < FEWEST_SEEDS:
            counted = "1 seed is" if self.seeds == 1 else f"{self.seeds} seeds are"
            return f"No winner: {counted} fewer than the {FEWEST_SEEDS} required."
        level = f"at {100 * self.level:g} %"
        if self.winner is not None:
            return f"{best} is best: {level}, corrected for all pairs, it differs from every other."
        pairs = [pair for pair in self.comparisons if pair.first == best]
        if unclear := [pair.second for pair in pairs if not self.separates(pair)]:
            return f"No winner: {level}, {best} and {self._named(unclear)} do not differ significantly."
        close = [pair.second for pair in pairs if not self.is_worth_naming(pair)]
        return f"No winner: {best} differs from {self._named(close)} by less than {self.smallest:g}."

    def _named(self, rivals: Sequence[str]) -> str:
        """The rivals by name, or their number."""
        return "; ".join(rivals) if len(rivals) <= MOST_RIVALS else f"{len(rivals)} of the {len(self.order) - 1} others"

    def is_worth_naming(self, pair: Comparison) -> bool:
        """Whether the pair's mean difference is at least the smallest that names a winner."""
        return abs(pair.difference.mean) >= self.smallest

    def separates(self, pair: Comparison) -> bool:
        """Whether the pair differs significantly: its interval excludes 0, and its corrected p-value is small."""
        return pair.difference.excludes(0) and pair.p < 1 - self.level


def ranking(
    values_by_name: Mapping[str, ArrayLike],
    *,
    lower_is_better: bool = True,
    level: float = LEVEL,
    smallest: float = 0.0,
) -> Ranking:
    """Rank names by the means of their values, one per seed, in the same order of seeds for all.

    A winner needs `FEWEST_SEEDS` seeds, a paired interval against every other that excludes 0, also
    by p-values with Holm's correction over all pairs, because the best was chosen on the same data, and
    a difference of at least `smallest` from every other. Raises `ValueError` if the
    names have different numbers of values or none, and `UserError` without scipy.
    """
    values = {name: np.asarray(row, dtype=float) for name, row in values_by_name.items()}
    sizes = {row.size for row in values.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"numbers of values are {sorted(sizes)}: a ranking needs the same seeds for every name")
    (seeds,) = sizes
    sign = 1 if lower_is_better else -1
    # Diverged names have no mean, and are last.
    means = {name: sign * float(row.mean()) if np.isfinite(row).all() else math.inf for name, row in values.items()}
    order = tuple(sorted(values, key=means.__getitem__))
    if seeds < 2:
        return Ranking(order, (), None, level, seeds, smallest)
    rows = np.stack([values[name] for name in order])
    first, second = np.triu_indices(len(order), 1)
    differences = _differences(rows[first], rows[second])
    compared = zip(combinations(order, 2), _intervals(differences, level), holm(_p_values(differences)), strict=True)
    comparisons = tuple(Comparison(*names, interval, p) for names, interval, p in compared)
    tied = Ranking(order, comparisons, None, level, seeds, smallest)
    against_best = [pair for pair in comparisons if pair.first == order[0]]
    clear = bool(against_best) and all(tied.separates(pair) and tied.is_worth_naming(pair) for pair in against_best)
    return replace(tied, winner=order[0]) if clear and seeds >= FEWEST_SEEDS else tied


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or not first.ndim:
        raise ValueError(f"shapes {first.shape} and {second.shape} cannot be paired: one value per seed on both sides")
    if first.shape[-1] < 2:
        raise UserError(f"{first.shape[-1]} pair of seeds gives no interval: train both with two or more seeds")
    with np.errstate(invalid="ignore"):  # of two that diverged
        return first - second


def _intervals(rows: np.ndarray, level: float) -> list[Interval]:
    """The mean of each row [rows, seeds] with its t interval."""
    seeds = rows.shape[1]
    means, errors = _means_and_errors(rows)
    reach = _t_quantile(level, seeds - 1) * errors
    ends = zip(means.tolist(), (means - reach).tolist(), (means + reach).tolist(), strict=True)
    return [Interval(mean, low, high, seeds) for mean, low, high in ends]


def _p_values(differences: np.ndarray) -> list[float]:
    """p-values of the two-sided paired t test of each row [rows, seeds]; 1 for NaN differences."""
    means, errors = _means_and_errors(differences)
    with np.errstate(divide="ignore", invalid="ignore"):  # of no spread at all, or no numbers
        p_values = 2 * _student().sf(np.abs(means) / errors, differences.shape[1] - 1)
    return np.where(np.isfinite(means + errors) & (means != 0), p_values, 1.0).tolist()


def _means_and_errors(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each row [rows, seeds], and its standard error."""
    with np.errstate(invalid="ignore"):  # of runs that diverged
        return rows.mean(-1), rows.std(-1, ddof=1) / math.sqrt(rows.shape[1])


def _t_quantile(level: float, degrees: int) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: it must be between 0 and 1")
    return float(_student().ppf((1 + level) / 2, degrees))


def _student():  # type: ignore[no-untyped-def]  # a distribution of scipy, which has no types
    try:
        from scipy.stats import t
    except ImportError:
        raise UserError('intervals need scipy, which is not installed: pip install -e ".[lab]"') from None
    return t
