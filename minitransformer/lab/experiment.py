"""The interface of experiments: tasks measured in any order, findings from all results, and how claims are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from minitransformer.registry import Registered
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.statistics import (
    FEWEST_SEEDS,
    LEVEL,
    Interval,
    holm,
    loglog_slope,
    mean_interval,
    p_text,
    p_value,
)
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task


@dataclass(frozen=True)
class ExperimentSettings:
    """The user's settings of an experiment."""

    quick: bool = False
    """reduced version with fewer sizes, steps and seeds"""
    data: str = "shakespeare"
    """training data of the experiments: a recipe or a file, as for `train.py --data`"""


@dataclass(frozen=True)
class Criterion:
    """A claim and its measurement.

    With `must_hold`, it is a known result, and a failure is a defect; otherwise it is on trial, and either outcome is
    published. `holds` is None if the seeds leave it open.
    """

    claim: str
    measured: str
    holds: bool | None
    must_hold: bool = True

    @property
    def outcome(self) -> str:
        """The outcome in a word or two."""
        if self.holds is None:
            return "open"
        if self.must_hold:
            return "passed" if self.holds else "FAILED"
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim on trial that the mean gain is positive, to be judged together with all others of its experiment."""

    claim: str
    gains: Sequence[float]
    """one paired gain per seed"""
    unit: str = ""


def judged(claims: Sequence[Claim]) -> list[Criterion]:
    """Judge the claims of one experiment by paired t tests with Holm's correction for their number.

    A claim with fewer than `FEWEST_SEEDS` seeds is open, but counts for the correction.
    """
    tested = [p_value(claim.gains) if len(claim.gains) >= FEWEST_SEEDS else 1.0 for claim in claims]
    number = "1 claim" if len(claims) == 1 else f"{len(claims)} claims"
    criteria = []
    for claim, p in zip(claims, holm(tested), strict=True):
        if not claim.gains:
            criteria.append(Criterion(claim.claim, "not measured", None, must_hold=False))
            continue
        gain = mean_interval(claim.gains)
        measured = f"gain {gain}{claim.unit}, {seeds(gain.n)}"
        if gain.n < FEWEST_SEEDS:
            measured, holds = f"{measured}: fewer than {FEWEST_SEEDS} decide nothing", None
        else:
            equals = "" if p_text(p).startswith("<") else "= "
            measured = f"{measured}, p {equals}{p_text(p)} (Holm, {number})"
            holds = gain.mean > 0 if p < 1 - LEVEL else None
        criteria.append(Criterion(claim.claim, measured, holds, must_hold=False))
    return criteria


def seeds(n: int) -> str:
    """The number of seeds, in words."""
    return "1 seed" if n == 1 else f"{n} seeds"


@dataclass(frozen=True)
class Findings:
    """The findings of an experiment. `claims` are judged together, and follow the criteria."""

    criteria: Sequence[Criterion]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    remarks: Sequence[str] = ()
    _: KW_ONLY
    claims: InitVar[Sequence[Claim]] = ()

    def __post_init__(self, claims: Sequence[Claim]) -> None:
        object.__setattr__(self, "criteria", (*self.criteria, *judged(claims)))


class Experiment(Registered, kind="experiment"):
    """An experiment on one question, registered by a short name, such as "E1".

    `measure` runs in a separate single-threaded process, and is deterministic; `conclude` gets all available results in
    the order of their tasks.
    """

    title: ClassVar[str]
    question: ClassVar[str]
    source: ClassVar[str]
    """the figure or theorem that it reproduces"""
    minutes: ClassVar[float]
    """approximate duration on two cores"""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings

    def prepare(self) -> None:
        """Prepare shared data before the first task; raises `UserError` if it is unavailable."""

    def tasks(self) -> Sequence[Task]:
        """The initial tasks."""
        raise NotImplementedError

    def further_tasks(self, results: Sequence[Result]) -> Sequence[Task]:
        """Further tasks that depend on results, called until there are no new ones. Results are in the order of their
        tasks, and some may be missing."""
        return []

    def measure(self, task: Task) -> Measurement:
        """Measure one task. Raises `UserError` for a user's mistake, such as missing data."""
        raise NotImplementedError

    def conclude(self, results: Sequence[Result]) -> Findings:
        """The findings from the results."""
        raise NotImplementedError


def select(results: Sequence[Result], where: Mapping[str, Any]) -> list[Result]:
    """The results of tasks with the values `where`."""
    return [result for result in results if all(result.task.get(key) == value for key, value in where.items())]


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
