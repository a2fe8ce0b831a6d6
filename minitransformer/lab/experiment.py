"""What an experiment is: tasks that are measured in any order, and a conclusion from all that was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from minitransformer.registry import Registered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Task = dict[str, Any]
"""What is measured once, in values that JSON has: it names every choice, the seed among them, and so is its own key."""
Measurement = dict[str, Any]
"""What was measured, in values that JSON has."""


@dataclass(frozen=True)
class Settings:
    """What the user chooses of an experiment."""

    quick: bool = False
    """a reduced form, for a first look: fewer sizes, steps and seeds"""
    data: str = "shakespeare"
    """what training experiments learn from: a recipe or a file, as `train.py --data` takes it"""


@dataclass(frozen=True)
class Result:
    """A task and its measurement."""

    task: Task
    measured: Measurement


@dataclass(frozen=True)
class Criterion:
    """A claim beside what was measured.

    With `must_hold`, it reproduces what is known, and a failure is a defect; otherwise it is on trial, and its outcome
    is published whichever way it falls. `holds` is None where the interval leaves it open.
    """

    claim: str
    measured: str
    holds: bool | None
    must_hold: bool = True


@dataclass(frozen=True)
class Table:
    """A table of the report, and a CSV file of its own; cells are text, numbers or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report, and a PNG file of its own; `draw` imports matplotlib."""

    title: str
    draw: Callable[[], Figure]
    caption: str = ""


@dataclass(frozen=True)
class Findings:
    """What an experiment has to say."""

    criteria: Sequence[Criterion]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    remarks: Sequence[str] = ()


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

    def __init__(self, settings: Settings) -> None:
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
