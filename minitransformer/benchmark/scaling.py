"""How memory and time grow with the size of the problem."""

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
from minitransformer.benchmark.workers import ContestantFailed, Worker, peak_megabytes
from minitransformer.registry import Registered

LEAST_SECONDS = 0.05
"""a shorter measurement is repeated, and the median of three counts"""


@dataclass(frozen=True)
class Quantity:
    """Something that grows, and how to measure it in a process of its own; `measure` has to be picklable."""

    name: str
    unit: str
    measure: Callable[[BenchSetting], float]


class Axis(Registered, kind="axis"):
    """What is made larger, and what is measured of it. Each measurement has a process of its own."""

    about: ClassVar[str]
    sizes: ClassVar[Iterable[int]]
    size_unit: ClassVar[str]

    def __init__(self, setting: BenchSetting) -> None:
        self.setting = setting

    @abstractmethod
    def at(self, size: int) -> BenchSetting:
        """What is measured at a size."""

    @abstractmethod
    def quantities(self) -> list[Quantity]:
        """What is measured there."""


@dataclass(frozen=True)
class Growth:
    """The sizes that were measured, and of each quantity its value at each of them."""

    axis: type[Axis]
    points: dict[str, list[tuple[int, float]]]
    units: dict[str, str]
    stopped: str
    """why there are no larger sizes"""

    def exponent(self, name: str) -> Exponent | None:
        """The p of quantity ∝ size^p; None with fewer than two sizes."""
        return self._exponent(self.points[name])

    def last_exponent(self, name: str) -> Exponent | None:
        """The same between the two largest sizes alone, where what does not grow weighs least."""
        return self._exponent(self.points[name][-2:])

    @staticmethod
    def _exponent(points: Sequence[tuple[int, float]]) -> Exponent | None:
        return Exponent.of([size for size, _ in points], [value for _, value in points])


MeasureWork = Callable[[Callable[[], Work]], float]


def measured_alone(prepare: Callable[[], Work]) -> float:
    """One sample in a process of its own; raises `ContestantFailed`."""
    worker = Worker(prepare)
    try:
        worker.cost()
        return worker.sample()
    finally:
        worker.close()


def grow(
    axis: Axis,
    budget_seconds: float,
    *,
    report: Callable[[str], None] = lambda line: None,
    measure: MeasureWork = measured_alone,
    clock: Callable[[], float] = time.monotonic,
) -> Growth:
    """Measure one size after the other, until the next would not fit into what is left of `budget_seconds`.

    The next is taken to last as much longer as its size is larger. The first two are measured in any case: one size has
    no growth.
    """
    end = clock() + budget_seconds
    quantities = axis.quantities()
    points: dict[str, list[tuple[int, float]]] = {quantity.name: [] for quantity in quantities}
    stopped, before, lasted = "all sizes", 0, 0.0
    for number, size in enumerate(axis.sizes):
        if number >= 2 and clock() + lasted * size / before > end:
            stopped = f"{_grouped(size)} would not fit into the budget"
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
    """Tokens that a model sees at once."""

    about = "tokens of a sequence, batch 1"
    sizes = _doubling(512, 32768)
    size_unit = "tokens"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, shape=replace(self.setting.shape, context_length=size, batch_size=1))

    def quantities(self) -> list[Quantity]:
        return [*_training(), Quantity("decoding", "s", decoding_seconds)]


class Vocabulary(Axis, name="vocabulary"):
    """Tokens that there are."""

    about = "tokens of the vocabulary"
    sizes = _doubling(1024, 262144, 4)
    size_unit = "tokens"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, shape=replace(self.setting.shape, vocab_size=size))

    def quantities(self) -> list[Quantity]:
        return _training()


class BatchSize(Axis, name="batch"):
    """Sequences of a step."""

    about = "sequences of a training step"
    sizes = _doubling(1, 1024)
    size_unit = "sequences"

    def at(self, size: int) -> BenchSetting:
        return replace(self.setting, shape=replace(self.setting.shape, batch_size=size))

    def quantities(self) -> list[Quantity]:
        return _training()


class CorpusSize(Axis, name="corpus"):
    """Text that is prepared for training: read, divided, encoded with a ready tokenizer, written."""

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
    """MB that two training steps take beyond the model before its first."""
    from minitransformer.benchmark.ours import peak_on
    from minitransformer.benchmark.stepping import our_step

    step = our_step(setting, "fp32", False)
    before = peak_on(setting.device)
    for _ in range(2):
        step()
    return peak_on(setting.device) - before


def training_seconds(setting: BenchSetting) -> float:
    """Of a training step that is not the first."""
    from minitransformer.benchmark.ours import synchronise
    from minitransformer.benchmark.stepping import our_step

    step = our_step(setting, "fp32", False)
    step()
    return _median_seconds(step, partial(synchronise, setting.device))


def decoding_seconds(setting: BenchSetting) -> float:
    """To decode until the context is full."""
    from minitransformer.benchmark.decoding import ours_decode
    from minitransformer.benchmark.ours import synchronise

    once = ours_decode(setting, "fp32", setting.shape.context_length - setting.prompt, 1)
    return _median_seconds(once, partial(synchronise, setting.device))


def preparing_seconds(setting: BenchSetting) -> float:
    """To prepare so many MB of text."""
    return _prepared(setting)[0]


def preparing_memory(setting: BenchSetting) -> float:
    """The highest resident memory of a process that prepares so many MB of text."""
    return _prepared(setting)[1]


def _prepared(setting: BenchSetting) -> tuple[float, float]:
    """Seconds, and MB at most."""
    from minitransformer.benchmark.subjects.tokenizers import texts_of
    from minitransformer.text.corpora import open_corpus
    from minitransformer.text.datasets.text import TextPreparation

    with tempfile.TemporaryDirectory(prefix="minitransformer-bench-") as folder:
        path = Path(folder) / "text.txt"
        first = "".join(texts_of(setting.data, 1))
        with path.open("w", encoding="utf-8") as file:
            for _ in range(int(setting.megabytes)):
                file.write(first)
        start = time.perf_counter()
        cache = Path(folder) / "prepared"
        TextPreparation(open_corpus(str(path)), "bytes", context_length=64, cache=cache, progress=False).run()
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
