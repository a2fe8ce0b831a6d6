"""What a benchmark is made of: a setting, subjects, and the contestants that are measured beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from minitransformer.benchmark.peers import NanoGPT
from minitransformer.benchmark.shape import Shape
from minitransformer.registry import Registered


@dataclass(frozen=True)
class BenchSetting:
    """What holds for all contestants of a run of the benchmark."""

    shape: Shape
    device: str = "cpu"
    against: NanoGPT | None = None
    data: str = "pydocs"
    """text for what needs some: a recipe or a file"""
    megabytes: float = 2.0
    """of the text, for tokenizers"""
    prompt: int = 8
    """tokens before the first that is decoded"""
    tokens: int = 500
    """to decode, where the context has room for them"""
    target_loss: float = 2.6
    """nats a character, on validation"""
    seconds: float = 0.3
    """that a sample takes at least: what is shorter is repeated"""
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """What one unit of work (a token) asks of the machine: operations, and bytes that have to be read."""

    flops: float
    bytes: float
    precision: str = "fp32"


@dataclass(frozen=True)
class Work:
    """What a contestant does once it has prepared itself: `sample()` is one measurement, in the unit of its case."""

    sample: Callable[[], float]
    cost: Cost | None = None


@dataclass(frozen=True)
class Contestant:
    """A name, and how to get ready in a process of its own; `prepare` has to be picklable."""

    name: str
    prepare: Callable[[], Work]
    base: bool = False
    """whether others are compared with it, if it is the first of these"""


@dataclass(frozen=True)
class Absent:
    """A contestant that cannot be measured here, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Case:
    """One thing that is measured, of all contestants."""

    title: str
    unit: str
    contestants: tuple[Contestant, ...]
    absent: tuple[Absent, ...] = ()
    lower_is_better: bool = False
    fresh: bool = False
    """whether each sample needs a new process, as a peak of memory does"""
    warmup: bool = True
    """whether the first samples of a process differ from later ones"""

    @classmethod
    def of(
        cls,
        title: str,
        unit: str,
        entries: Iterable[Contestant | Absent],
        *,
        lower_is_better: bool = False,
        fresh: bool = False,
        warmup: bool = True,
    ) -> Case:
        """The case of `entries`, those that can be measured and those that cannot."""
        entries = list(entries)
        return cls(
            title,
            unit,
            tuple(entry for entry in entries if isinstance(entry, Contestant)),
            tuple(entry for entry in entries if isinstance(entry, Absent)),
            lower_is_better,
            fresh,
            warmup,
        )


class Subject(Registered, kind="subject"):
    """Something worth measuring: one class in a file of `subjects/`, found by its name."""

    about: ClassVar[str]

    def __init__(self, setting: BenchSetting) -> None:
        self.setting = setting

    def cases(self) -> Iterable[Case]:
        """What is measured; raises `UserError` for a setting in which nothing can be."""
        raise NotImplementedError


def missing(package: str, contestant: str) -> Absent | None:
    """The contestant that needs `package`, where it is not installed."""
    return None if find_spec(package) else Absent(contestant, f"{package} is not installed: pip install {package}")
