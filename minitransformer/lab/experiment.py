"""What an experiment is: tasks that are measured in any order, and a conclusion from all that was measured."""

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
    """What the user chooses of an experiment."""

    quick: bool = False
    """a reduced form, for a first look: fewer sizes, steps and seeds"""
    data: str = "shakespeare"
    """what training experiments learn from: a recipe or a file, as `train.py --data` takes it"""


@dataclass(frozen=True)
class Criterion:
    """A claim beside what was measured.

    With `must_hold`, it reproduces what is known, and a failure is a defect; otherwise it is on trial, and its outcome
    is published whichever way it falls. `holds` is None where the seeds leave it open.
    """

    claim: str
    measured: str
    holds: bool | None
    must_hold: bool = True

    @property
    def outcome(self) -> str:
        """In a word or two: whether a known result was reproduced, or how one on trial came out."""
        if self.holds is None:
            return "open"
        if self.must_hold:
            return "passed" if self.holds else "FAILED"
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim on trial, that gains are positive on average: no criterion until it is judged beside all the others of
    its experiment."""

    claim: str
    gains: Sequence[float]
    """one for each seed, both sides of it measured with that seed"""
    unit: str = ""


def judged(claims: Sequence[Claim]) -> list[Criterion]:
    """The claims of one experiment, each decided by its paired t test with Holm's correction for their number.

    With fewer than `FEWEST_SEEDS` seeds a claim is open, and counts among them all the same.
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
    """How many, in words."""
    return "1 seed" if n == 1 else f"{n} seeds"


@dataclass(frozen=True)
class Findings:
    """What an experiment has to say. `claims` are judged here, together, and follow the criteria."""

    criteria: Sequence[Criterion]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    remarks: Sequence[str] = ()
    _: KW_ONLY
    claims: InitVar[Sequence[Claim]] = ()

    def __post_init__(self, claims: Sequence[Claim]) -> None:
        object.__setattr__(self, "criteria", (*self.criteria, *judged(claims)))


class Experiment(Registered, kind="experiment"):
    """One question. Experiments are registered by a short name, such as "E1".

    `measure` runs in a process of its own with one thread, and gives the same numbers for the same task whenever it is
    asked; `conclude` gets all results in the order in which they were asked for, or those that there are of a sweep
    that was stopped.
    """

    title: ClassVar[str]
    question: ClassVar[str]
    source: ClassVar[str]
    """which figure or theorem of which paper it repeats"""
    minutes: ClassVar[float]
    """how long it takes on two cores, about"""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings

    def prepare(self) -> None:
        """Make ready what all tasks share, before the first of them; raises `UserError` if that cannot be had."""

    def tasks(self) -> Sequence[Task]:
        """All that is to be measured, or what is to be measured first."""
        raise NotImplementedError

    def further_tasks(self, results: Sequence[Result]) -> Sequence[Task]:
        """What the results ask for: first those of `tasks`, then with those of what they asked for, until that is
        nothing new. Results are in the order of their tasks, and some may be missing."""
        return []

    def measure(self, task: Task) -> Measurement:
        """The measurement of one task. Raises `UserError` for what the user can mend, such as missing data."""
        raise NotImplementedError

    def conclude(self, results: Sequence[Result]) -> Findings:
        """What the results say."""
        raise NotImplementedError


def select(results: Sequence[Result], where: Mapping[str, Any]) -> list[Result]:
    """The results whose tasks have all the values of `where`."""
    return [result for result in results if all(result.task.get(key) == value for key, value in where.items())]
