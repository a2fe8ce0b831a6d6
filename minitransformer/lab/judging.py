"""From values over seeds to criteria, curves and the intervals that they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from minitransformer.lab.experiment import Criterion
from minitransformer.lab.figures import Curve
from minitransformer.lab.statistics import Interval, loglog_slope, mean_interval


def between(claim: str, value: Interval, low: float, high: float) -> Criterion:
    """Holds if the mean lies in [low, high]: accepted ranges are of means over seeds; the interval is shown."""
    text = "no number: a value is 0 or infinite" if math.isnan(value.mean) else f"{value}"
    return Criterion(claim, f"{text}, {seeds(value.n)}", low <= value.mean <= high)


def seeds(n: int) -> str:
    """How many, in words."""
    return "1 seed" if n == 1 else f"{n} seeds"


def exponent(x: Sequence[float], rows: ArrayLike) -> Interval:
    """p of y ∝ x^p, from `rows` (seeds × points) of y; not a number where a y has no logarithm."""
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
