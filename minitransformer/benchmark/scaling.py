"""Scaling of memory and time with problem size."""

from __future__ import annotations

import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from minitransformer.benchmark.case import BenchSetting, Work
from minitransformer.benchmark.statistics import Exponent
from minitransformer.benchmark.workers import ContestantFailed, measured_alone, peak_megabytes
from minitransformer.registry import Registered

LEAST_SECONDS = 0.05
"""minimum seconds of a measurement; shorter ones are repeated, and the median of three is used"""


@dataclass(frozen=True)
class Quantity:
    """A quantity, and how to measure it in a separate process; `measure` must be picklable."""

    name: str
    unit: str
    measure: Callable[[BenchSetting], float]


class Axis(Registered, kind="axis"):
    """A dimension of the problem, and the quantities measured along it, each in a separate process."""

    about: ClassVar[str]
    sizes: ClassVar[Iterable[int]]
    size_unit: ClassVar[str]

    def __init__(self, setting: BenchSetting) -> None:
        self.setting = setting

    @abstractmethod
    def at(self, size: int) -> BenchSetting:
        """The setting of this size."""

    @abstractmethod
    def quantities(self) -> list[Quantity]:
        """The quantities to measure."""


@dataclass(frozen=True)
class Growth:
    """The measured sizes, and the value of each quantity at each size."""

    axis: type[Axis]
    points: dict[str, list[tuple[int, float]]]
    units: dict[str, str]
    stopped: str
    """why there are no larger sizes"""

    def exponent(self, name: str) -> Exponent | None:
        """The p of quantity ∝ size^p; None with fewer than two sizes."""
        return self._exponent(self.points[name])

    def last_exponent(self, name: str) -> Exponent | None:
        """The exponent between the two largest sizes, where constant terms matter least."""
        return self._exponent(self.points[name][-2:])

    @staticmethod
    def _exponent(points: Sequence[tuple[int, float]]) -> Exponent | None:
        return Exponent.of([size for size, _ in points], [value for _, value in points])


def grow(
    axis: Axis,
    budget_seconds: float,
    *,
    report: Callable[[str], None] = lambda line: None,
    measure: Callable[[Callable[[], Work]], float] = measured_alone,
    clock: Callable[[], float] = time.monotonic,
) -> Growth:
    """Measure increasing sizes, until the next one would exceed `budget_seconds`.

    Time is assumed to be proportional to size. The first two sizes are always measured.
    """
    end = clock() + budget_seconds
    quantities = axis.quantities()
    points: dict[str, list[tuple[int, float]]] = {quantity.name: [] for quantity in quantities}
    stopped, before, lasted = "all sizes", 0, 0.0
    for number, size in enumerate(axis.sizes):
        if number >= 2 and clock() + lasted * size / before > end:
            stopped = f"{_grouped(size)} would exceed the time limit"
            break
        start = clock()
        try:
            for quantity in quantities:
                report(f"{axis.name}: {quantity.name} at {_grouped(size)} {axis.size_unit}")
                value = measure(partial(_work, quantity.measure, axis.at(size)))
                points[quantity.name].append((size, value))
        except ContestantFailed as failure:
            stopped = f"at {_grouped(size)}: {failure}"
            break
        before, lasted = size, clock() - start
    return Growth(type(axis), points, {quantity.name: quantity.unit for quantity in quantities}, stopped)


def _work(measure: Callable[[BenchSetting], float], setting: BenchSetting) -> Work:
    return Work(partial(measure, setting))


def _grouped(size: int) -> str:
    return f"{size:,}"


# --- the axes


def _doubling(first: int, last: int, factor: int = 2) -> list[int]:
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes


class Context(Axis, name="context"):
    """Context length."""

    about = "tokens of a sequence, batch 1"
    sizes = _doubling(512, 32768)
    size_unit = "tokens"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, shape=replace(self.setting.shape, context_length=size, batch_size=1))

    def quantities(self) -> list[Quantity]:
        return [*_training(), Quantity("decoding", "s", decoding_seconds)]


class Vocabulary(Axis, name="vocabulary"):
    """Vocabulary size."""

    about = "tokens of the vocabulary"
    sizes = _doubling(1024, 262144, 4)
    size_unit = "tokens"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, shape=replace(self.setting.shape, vocab_size=size))

    def quantities(self) -> list[Quantity]:
        return _training()


class BatchSize(Axis, name="batch"):
    """Batch size."""

    about = "sequences of a training step"
    sizes = _doubling(1, 1024)
    size_unit = "sequences"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, shape=replace(self.setting.shape, batch_size=size))

    def quantities(self) -> list[Quantity]:
        return _training()


class CorpusSize(Axis, name="corpus"):
    """Text prepared for training: read, split, encoded with a given tokenizer, written."""

    about = "MB of text that are prepared with the bytes tokenizer"
    sizes = _doubling(1, 10_000, 4)
    size_unit = "MB"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, megabytes=size)

    def quantities(self) -> list[Quantity]:
        return [Quantity("peak memory", "MB", preparing_memory), Quantity("preparing", "s", preparing_seconds)]


def _training() -> list[Quantity]:
    return [Quantity("training memory", "MB", training_memory), Quantity("training step", "s", training_seconds)]


# --- what is measured, in processes of their own


def training_memory(setting: BenchSetting) -> float:
    """Peak MB of two training steps, without the initial model."""
    from minitransformer.benchmark.ours import peak_on
    from minitransformer.benchmark.stepping import our_step

    step = our_step(setting, "fp32", False)
    before = peak_on(setting.device)
    for _ in range(2):
        step()
    return peak_on(setting.device) - before


def training_seconds(setting: BenchSetting) -> float:
    """Seconds of a training step after the first."""
    from minitransformer.benchmark.ours import synchronise
    from minitransformer.benchmark.stepping import our_step

    step = our_step(setting, "fp32", False)
    step()
    return _median_seconds(step, partial(synchronise, setting.device))


def decoding_seconds(setting: BenchSetting) -> float:
    """Seconds of decoding until the context is full."""
    from minitransformer.benchmark.decoding import ours_decode
    from minitransformer.benchmark.ours import synchronise

    once = ours_decode(setting, "fp32", setting.shape.context_length - setting.prompt, 1)
    return _median_seconds(once, partial(synchronise, setting.device))


def preparing_seconds(setting: BenchSetting) -> float:
    """Seconds of preparing this many MB of text."""
    return _prepared(setting)[0]


def preparing_memory(setting: BenchSetting) -> float:
    """Peak resident memory of a process that prepares this many MB of text."""
    return _prepared(setting)[1]


def _prepared(setting: BenchSetting) -> tuple[float, float]:
    """Seconds, and peak MB."""
    from minitransformer.benchmark.subjects.tokenizers import texts_of
    from minitransformer.text.corpora import open_corpus
    from minitransformer.text.datasets.text import TextPreparation
    from minitransformer.text.tokenizers import Bytes

    with tempfile.TemporaryDirectory(prefix="minitransformer-bench-") as folder:
        path = Path(folder) / "text.txt"
        first = "".join(texts_of(setting.data, 1))
        with path.open("w", encoding="utf-8") as file:
            for _ in range(int(setting.megabytes)):
                file.write(first)
        start = time.perf_counter()
        cache = Path(folder) / "prepared"
        TextPreparation(open_corpus(str(path)), Bytes.choose(), context_length=64, cache=cache, progress=False).run()
        return time.perf_counter() - start, peak_megabytes()


def _median_seconds(once: Callable[[], object], finish: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        once()
        finish()
        return time.perf_counter() - start

    first = seconds()
    if first >= LEAST_SECONDS:
        return first
    return sorted((first, seconds(), seconds()))[1]
