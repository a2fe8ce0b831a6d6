"""The interface of experiments: tasks measured in any order, and findings from all results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, ClassVar

from minitransformer.registry import Registered
from minitransformer.reporting.statistics import FEWEST_SEEDS, LEVEL, holm, mean_interval, p_text, p_value
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
