"""What several seeds allow one to say: means, paired differences and slopes with their intervals.

Runs with the same seed share their initialisation and their batches, so differences are taken within seeds (paired).
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
"""of intervals, and one minus the largest corrected p-value that decides"""
FEWEST_SEEDS = 5
"""paired seeds from which on a winner is named, or a claim decided"""
MOST_RIVALS = 3
"""that are named one by one"""


@dataclass(frozen=True)
class Interval:
    """The mean of `n` values, and the interval that holds the expected value at the level that was asked for.

    One value says nothing of the spread: its interval is from −∞ to ∞.
    """

    mean: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside; False where the interval is not a number, as after divergence."""
        return value < self.low or value > self.high

    def __str__(self) -> str:
        """Mean and ends, to two digits of half the interval; the mean alone where the ends are unknown."""
        reach = self.high - self.mean
        if not math.isfinite(reach) or reach <= 1e-12 * abs(self.mean):  # less is rounding
            return f"{self.mean:.4g}"
        decimals = decimals_of(reach)
        return f"{self.mean:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def decimals_of(reach: float) -> int:
    """How many decimals show two digits of `reach`, half of an interval (GUM 7.2.6: more would claim too much)."""
    return max(0, 1 - math.floor(math.log10(reach)))


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """The mean of `values` (one per seed) with its t interval; raises `ValueError` without values, and `UserError`
    without scipy."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values have shape {array.shape}: a mean needs a row of at least one")
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
    """Of the two-sided t test of a mean of 0 of `values`, such as paired differences (one per seed); 1 for fewer than
    two, and where they are not finite. Raises `UserError` without scipy."""
    array = np.asarray(values, dtype=float)
    return 1.0 if array.size < 2 else _p_values(array[None])[0]


def p_text(p: float) -> str:
    """Three decimals of a p-value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number: each compared with α then errs with probability α in all of them.

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
    """Names from the best mean to the worst, every pair, and the winner, if the seeds allow one to name it."""

    order: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    winner: str | None
    level: float
    seeds: int
    smallest: float = 0.0
    """difference from which on it is worth naming a winner"""

    def __str__(self) -> str:
        best, *others = self.order
        if not others:
            return f"{best} has nothing to be compared with."
        if self.seeds < FEWEST_SEEDS:
            counted = "1 seed is" if self.seeds == 1 else f"{self.seeds} seeds are"
            return f"No winner: {counted} fewer than the {FEWEST_SEEDS} that one needs."
        level = f"at {100 * self.level:g} %"
        if self.winner is not None:
            return f"{best} is best: {level}, corrected for all pairs, it differs from every other."
        pairs = [pair for pair in self.comparisons if pair.first == best]
        if unclear := [pair.second for pair in pairs if not self.separates(pair)]:
            return f"No winner: {level}, the seeds do not tell {best} from {self._named(unclear)}."
        close = [pair.second for pair in pairs if not self.is_worth_naming(pair)]
        return f"No winner: {best} differs from {self._named(close)} by less than {self.smallest:g}."

    def _named(self, rivals: Sequence[str]) -> str:
        """The rivals by name, or how many of the others they are."""
        return "; ".join(rivals) if len(rivals) <= MOST_RIVALS else f"{len(rivals)} of the {len(self.order) - 1} others"

    def is_worth_naming(self, pair: Comparison) -> bool:
        """Whether the pair's mean difference is as large as the smallest that is worth naming."""
        return abs(pair.difference.mean) >= self.smallest

    def separates(self, pair: Comparison) -> bool:
        """Whether the pair differs: its interval excludes 0, and its p-value corrected for all pairs is small."""
        return pair.difference.excludes(0) and pair.p < 1 - self.level


def ranking(
    values_by_name: Mapping[str, ArrayLike],
    *,
    lower_is_better: bool = True,
    level: float = LEVEL,
    smallest: float = 0.0,
) -> Ranking:
    """Ranks names by the means of their values, one for each seed and in the same order of seeds for all.

    A winner is named only from `FEWEST_SEEDS` seeds on, if its paired interval against every other excludes 0, and
    still does so by p-values with Holm's correction over all pairs, because the best was chosen by the same data; and
    if it differs from every other by `smallest` or more. Raises `ValueError` where the
    names have different numbers of values or none, and `UserError` without scipy.
    """
    values = {name: np.asarray(row, dtype=float) for name, row in values_by_name.items()}
    sizes = {row.size for row in values.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"numbers of values are {sorted(sizes)}: a ranking needs the same seeds for every name")
    (seeds,) = sizes
    sign = 1 if lower_is_better else -1
    # Names that diverged have no mean, and come last.
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
        raise UserError(
            f"{first.shape[-1]} pair of seeds says nothing of the spread: train both with two seeds or more"
        )
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
    """Of the two-sided paired t test of each row [rows, seeds]; 1 where the differences are no numbers."""
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
