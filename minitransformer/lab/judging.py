"""Criteria, curves and intervals from values over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from minitransformer.lab.experiment import Claim, Criterion, seeds
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.statistics import Interval, loglog_slope, mean_interval


def within(value: Interval, low: float, high: float) -> bool | None:
    """Whether the interval is in [low, high]; False if it is wholly outside or NaN, None if it crosses an end."""
    if low <= value.low and value.high <= high:
        return True
    return False if math.isnan(value.mean) or value.high < low or value.low > high else None


def between(claim: str, value: Interval, low: float, high: float, note: str = "") -> Criterion:
    """A known result: a mean over seeds in [low, high], by `within`; `note` is appended to the measurement."""
    text = "no number: a value is 0 or infinite" if math.isnan(value.mean) else f"{value}"
    return Criterion(claim, f"{text}, {seeds(value.n)}{note}", within(value, low, high))


def expected(
    claim: str,
    values: Sequence[float],
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    is_open: bool = False,
) -> Criterion:
    """`between` of `values` (one per seed); open if `is_open`, or without values."""
    if not values:
        return Criterion(claim, "not measured", None)
    criterion = between(claim, mean_interval(values), at_least, at_most)
    return replace(criterion, holds=None) if is_open else criterion


def on_trial(claim: str, gains: Sequence[float], unit: str = "") -> Claim:
    """A claim that `gains` (one per paired seed) are positive on average, for `Findings(claims=...)`."""
    return Claim(claim, gains, unit)


def exponent(x: Sequence[float], rows: ArrayLike) -> Interval:
    """p of y ∝ x^p, from `rows` (seeds × points) of y; NaN if a y has no logarithm."""
    values = np.asarray(rows, dtype=float)
    if not (np.isfinite(values) & (values > 0)).all():
        return Interval(math.nan, math.nan, math.nan, len(values))
    return loglog_slope(x, values)


def geometric_mean(values: ArrayLike) -> Interval:
    """The geometric mean of values (one per seed, none negative), with the interval of their logarithms' mean."""
    with np.errstate(divide="ignore"):
        log = mean_interval(np.log(np.asarray(values, dtype=float)))
    high = math.exp(log.high) if log.high < math.log(1e300) else math.inf
    return Interval(math.exp(log.mean), math.exp(log.low), high, log.n)


def curve(label: str, x: Sequence[float], rows: ArrayLike, *, geometric: bool = False) -> Curve:
    """The mean over seeds of `rows` (seeds × points) with its band, or the geometric mean of positive ones."""
    columns = np.asarray(rows, dtype=float).T
    intervals = [(geometric_mean if geometric else mean_interval)(column) for column in columns]
    return Curve(label, x, [i.mean for i in intervals], [i.low for i in intervals], [i.high for i in intervals])
