"""Rounds: in each, every contestant is measured once, in an order that is drawn anew."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from minitransformer.benchmark.case import Absent, Case, Contestant, Cost, Work
from minitransformer.benchmark.statistics import Ratio, Spread, Verdict, paired_ratio, verdict
from minitransformer.benchmark.workers import ContestantFailed, Worker

AGAIN = " (again)"
"""ends the name of the base measured as a contestant like any other: what it differs by from itself is noise"""
LEAST_ROUNDS = 3
"""of a case whose time is up, after one for warm-up: a median needs them"""


class Measurer(Protocol):
    """A contestant that is ready, wherever it runs."""

    def cost(self) -> Cost | None: ...

    def sample(self) -> float: ...

    def close(self) -> None: ...


Start = Callable[[Callable[[], Work]], Measurer]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How often to measure, and what to compare with."""

    rounds: int = 11
    warmup: int = 2
    """rounds before these, which are dropped: they fill caches and compile"""
    base: str | None = None
    """what others are compared with, where it takes part; None is the first that a case offers"""
    twin: bool = True
    """measure the base a second time, as if it were another, to see how far the machine alone puts two apart"""
    seconds: float = math.inf
    """after which a case begins no round that it can do without"""
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """The samples of a case, by contestant and round, and what may be said of them."""

    case: Case
    base: str | None
    samples: dict[str, list[float]]
    costs: dict[str, Cost | None] = field(default_factory=dict)
    absent: tuple[Absent, ...] = ()
    late: bool = False
    """whether there are fewer rounds than planned, as the time was up"""

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratio(self, name: str) -> Ratio:
        """How many times as good as the base, paired by rounds."""
        assert self.base is not None
        return paired_ratio(self.samples[name], self.samples[self.base], lower_is_better=self.case.lower_is_better)

    @property
    def floor(self) -> float:
        """The factor by which the base differs from itself, which no verdict may rest upon; 1 without its twin."""
        twin = f"{self.base}{AGAIN}"
        if twin not in self.samples:
            return 1.0
        median = self.ratio(twin).median
        return max(median, 1 / median)

    def verdict(self) -> Verdict | None:
        """Who won; None where nothing was measured."""
        rivals = {name: values for name, values in self.samples.items() if not name.endswith(AGAIN)}
        if not rivals:
            return None
        return verdict(rivals, lower_is_better=self.case.lower_is_better, floor=self.floor)


def measure(case: Case, plan: Plan, *, start: Start = Worker, report: Report = lambda line: None) -> Result:
    """The samples of all contestants that can be measured; the others are absent, with the reason.

    Whatever happens, also Ctrl-C, no process of a contestant is left when this returns.
    """
    began = time.monotonic()
    plan = replace(plan, warmup=0) if case.fresh or not case.warmup else plan
    case, base = _with_twin(case, plan)
    if case.fresh:
        return _measure_fresh(case, base, plan, start, report)
    with _ready(case, start, report) as (measurers, absent):
        costs = {name: measurer[1] for name, measurer in measurers.items()}
        samples: dict[str, list[float]] = {name: [] for name in measurers}
        rounds = _Rounds(list(measurers), plan, began)
        for number, order in rounds:
            for name in order:
                if name not in samples:
                    continue
                report(f"{case.title}: {_round(number, plan)}, {name}")
                try:
                    value = measurers[name][0].sample()
                except ContestantFailed as failure:
                    # Whoever misses a round cannot be paired with the others.
                    absent.append(Absent(name, str(failure)))
                    del samples[name]
                    continue
                if number >= 0:
                    samples[name].append(value)
        return _result(case, base, samples, costs, absent, rounds.late)


def _measure_fresh(case: Case, base: str | None, plan: Plan, start: Start, report: Report) -> Result:
    """As `measure`, each sample in a new process."""
    absent = list(case.absent)
    by_name = {contestant.name: contestant for contestant in case.contestants}
    samples: dict[str, list[float]] = {name: [] for name in by_name}
    rounds = _Rounds(list(by_name), plan, time.monotonic())
    for number, order in rounds:
        for name in order:
            if name not in samples:
                continue
            report(f"{case.title}: {_round(number, plan)}, {name}")
            measurer = start(by_name[name].prepare)
            try:
                measurer.cost()
                samples[name].append(measurer.sample())
            except ContestantFailed as failure:
                absent.append(Absent(name, str(failure)))
                del samples[name]
            finally:
                measurer.close()
    return _result(case, base, samples, {}, absent, rounds.late)


def _result(
    case: Case,
    base: str | None,
    samples: dict[str, list[float]],
    costs: dict[str, Cost | None],
    absent: Sequence[Absent],
    late: bool,
) -> Result:
    measured = [contestant.name for contestant in case.contestants if contestant.name in samples]
    # A base that failed leaves its place to the next.
    base = base if base in samples else next((name for name in measured if not name.endswith(AGAIN)), None)
    shown = tuple(entry for entry in absent if not entry.name.endswith(AGAIN))
    return Result(case, base, {name: samples[name] for name in measured}, costs, shown, late)


def _with_twin(case: Case, plan: Plan) -> tuple[Case, str | None]:
    """The case with its base measured twice, and the name of that."""
    names = [contestant.name for contestant in case.contestants]
    if not names:
        return case, None
    offered = [contestant.name for contestant in case.contestants if contestant.base] or names
    base = plan.base if plan.base in names else offered[0]
    if not plan.twin:
        return case, base
    place = names.index(base)
    twin = Contestant(f"{base}{AGAIN}", case.contestants[place].prepare)
    contestants = (*case.contestants[: place + 1], twin, *case.contestants[place + 1 :])
    return replace(case, contestants=contestants), base


class _Rounds:
    """The number of each round, below 0 for warm-up, and the names in a random order.

    So whoever comes after another does so by chance. `late` says whether some were left out, as the time was up.
    """

    def __init__(self, names: list[str], plan: Plan, began: float) -> None:
        self.names, self.plan = names, plan
        self.end = began + plan.seconds
        self.late = False

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        draws = random.Random(self.plan.seed)
        for number in range(-self.plan.warmup, self.plan.rounds):
            needed = number < LEAST_ROUNDS if number >= 0 else number == -self.plan.warmup
            if needed or time.monotonic() < self.end:
                yield number, draws.sample(self.names, len(self.names))
            elif number >= 0:
                self.late = True


def _round(number: int, plan: Plan) -> str:
    return "warm-up" if number < 0 else f"round {number + 1} of {plan.rounds}"


@contextmanager
def _ready(
    case: Case, start: Start, report: Report
) -> Iterator[tuple[dict[str, tuple[Measurer, Cost | None]], list[Absent]]]:
    """The contestants that are ready, with their costs, and those that are absent; closed at the end."""
    measurers: dict[str, tuple[Measurer, Cost | None]] = {}
    absent = list(case.absent)
    started: list[Measurer] = []
    try:
        for contestant in case.contestants:
            report(f"{case.title}: preparing {contestant.name}")
            measurer = start(contestant.prepare)
            started.append(measurer)
            # One after the other: those that prepare at the same time would not fit the memory that one needs.
            try:
                measurers[contestant.name] = measurer, measurer.cost()
            except ContestantFailed as failure:
                absent.append(Absent(contestant.name, str(failure)))
        yield measurers, absent
    finally:
        for measurer in started:
            measurer.close()
