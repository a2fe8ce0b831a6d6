"""The parts of a benchmark: a setting, subjects, cases and contestants."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from minitransformer.benchmark.peers import NanoGPT
from minitransformer.benchmark.shape import Shape
from minitransformer.evaluation.metrics import Metric
from minitransformer.registry import Registered

JUDGE = Metric.named("validation_loss")
"""what training is compared by"""


@dataclass(frozen=True)
class BenchSetting:
    """The settings shared by all contestants of a benchmark."""

    shape: Shape
    device: str = "cpu"
    against: NanoGPT | None = None
    data: str = "pydocs"
    """text for tokenizers and training: a recipe or a file"""
    megabytes: float = 2.0
    """megabytes of text for tokenizers"""
    prompt: int = 8
    """prompt length in tokens"""
    tokens: int = 500
    """number of tokens to generate, capped by the context length"""
    target_loss: float = 2.6
    """`JUDGE` that time-to-loss trains to; a target is a character"""
    seconds: float = 0.3
    """minimum duration of a sample; shorter work is repeated"""
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """The cost of one unit of work (a token): operations, and bytes read from memory."""

    flops: float
    bytes: float
    precision: str = "fp32"


@dataclass(frozen=True)
class Work:
    """A prepared contestant: `sample()` is one measurement, in the unit of its case."""

    sample: Callable[[], float]
    cost: Cost | None = None


@dataclass(frozen=True)
class Contestant:
    """A name, and how to prepare in a separate process; `prepare` must be picklable."""

    name: str
    prepare: Callable[[], Work]
    base: bool = False
    """whether it may be the baseline; the first one is"""


@dataclass(frozen=True)
class Absent:
    """A contestant that is unavailable here, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Case:
    """A quantity that is measured for all contestants."""

    title: str
    unit: str
    contestants: tuple[Contestant, ...]
    absent: tuple[Absent, ...] = ()
    lower_is_better: bool = False
    fresh: bool = False
    """whether each sample needs a new process, such as for peak memory"""
    warmup: bool = True
    """whether the first samples of a process differ from later ones"""

    @classmethod
    def of(cls, title: str, unit: str, entries: Iterable[Contestant | Absent], **about: bool) -> Case:
        """The case of `entries`, available or absent; `about` are the other fields."""
        entries = list(entries)
        present = tuple(entry for entry in entries if isinstance(entry, Contestant))
        return cls(title, unit, present, tuple(entry for entry in entries if isinstance(entry, Absent)), **about)


class Subject(Registered, kind="subject"):
    """A subject of the benchmark: one class in `subjects/`, registered by name."""

    about: ClassVar[str]

    def __init__(self, setting: BenchSetting) -> None:
        self.setting = setting

    def cases(self) -> Iterable[Case]:
        """The cases to measure; raises `UserError` for an impossible setting."""
        raise NotImplementedError


def missing(package: str, contestant: str) -> Absent | None:
    """An absent contestant if `package` is not installed."""
    return None if find_spec(package) else Absent(contestant, f"{package} is not installed: pip install {package}")
