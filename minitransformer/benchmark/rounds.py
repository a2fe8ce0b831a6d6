"""Rounds: in each, the base and one contestant are measured once, in an order that is drawn anew.

No more than these two are alive at a time, as the memory of a machine may not hold all contestants of a case.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol

from minitransformer.benchmark.budget import Budget
from minitransformer.benchmark.case import Absent, Case, Contestant, Cost, Work
from minitransformer.benchmark.statistics import Ratio, Spread, Verdict, compare_rounds, median_interval
from minitransformer.benchmark.workers import NO_TIME, ContestantFailed, TimeUp, Worker

AGAIN = " (again)"
"""ends the name of the base measured as a contestant like any other: what it differs by from itself is noise"""
LEAST_ROUNDS = 3
"""that a median needs: for them a contestant may take twice its share of the time"""


class Measurer(Protocol):
    """A contestant that is ready, wherever it runs."""

    def cost(self, deadline: float = math.inf) -> Cost | None: ...

    def sample(self, deadline: float = math.inf) -> float: ...

    def close(self) -> None: ...


StartMeasurer = Callable[[Callable[[], Work]], Measurer]
Report = Callable[[str], None]


@dataclass(frozen=True)
class RoundsPlan:
    """How often to measure, and what to compare with."""

    rounds: int = 11
    warmup: int = 2
    """samples of each before these, which are dropped: they fill caches and compile"""
    base: str | None = None
    """what others are compared with, where it takes part; None is the first that a case offers"""
    twin: bool = True
    """measure the base a second time, as if it were another, to see how far the machine alone puts two apart"""
    seconds: float = math.inf
    """that a case may take, from the start of its first process on"""
    seed: int = 0


@dataclass(frozen=True)
class CaseResult:
    """The samples of a case by contestant, those of the base in the same rounds, and what may be said of them."""

    case: Case
    base: str | None
    samples: dict[str, list[float]]
    """of the base, those of all rounds"""
    beside: dict[str, list[float]] = field(default_factory=dict)
    """by contestant, the samples of the base beside which it was measured"""
    costs: dict[str, Cost | None] = field(default_factory=dict)
    absent: tuple[Absent, ...] = ()
    late: bool = False
    """whether there are fewer rounds than planned, as the time was up"""

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratios(self, name: str) -> list[float]:
        """How many times as good as the base, round by round."""
        pairs = zip(self.samples[name], self.beside.get(name, self.samples[name]), strict=True)
        return [theirs / ours if self.case.lower_is_better else ours / theirs for ours, theirs in pairs]

    def ratio(self, name: str) -> Ratio:
        """The median of `ratios`, with its interval."""
        return median_interval(self.ratios(name))

    @property
    def floor(self) -> float:
        """The factor by which the base differs from itself, which no verdict may rest upon; 1 without its twin."""
        twin = f"{self.base}{AGAIN}"
        if twin not in self.samples:
            return 1.0
        median = self.ratio(twin).median
        return max(median, 1 / median)

    def verdict(self) -> Verdict | None:
        """Who won, by the ratios to the base, as many rounds of each as all have; None where nothing was measured."""
        rivals = {name: self.ratios(name) for name in self.samples if not name.endswith(AGAIN)}
        if not rivals:
            return None
        rounds = min(len(values) for values in rivals.values())
        return compare_rounds(
            {name: row[:rounds] for name, row in rivals.items()}, lower_is_better=False, floor=self.floor
        )


def measure(
    case: Case, plan: RoundsPlan, *, start: StartMeasurer = Worker, report: Report = lambda line: None
) -> CaseResult:
    """The samples of all contestants that can be measured in the time; the others are absent, with the reason.

    A base that fails leaves its place to the next. Whatever happens, also Ctrl-C, no process of a contestant is left
    when this returns.
    """
    began = monotonic()
    plan = replace(plan, warmup=0) if case.fresh or not case.warmup else plan
    kind = _Fresh if case.fresh else _Bouts
    while case.contestants:
        whole, base = _with_twin(case, plan)
        left = began + plan.seconds - monotonic()
        try:
            return kind(whole, base, replace(plan, seconds=left), start, report).result()
        except _BaseFailed as failure:
            others = tuple(contestant for contestant in case.contestants if contestant.name != base)
            case = replace(case, contestants=others, absent=(*case.absent, Absent(base, str(failure))))
    return CaseResult(case, None, {}, absent=case.absent)


class _BaseFailed(Exception):
    """The base cannot be measured, so nothing can be compared with it."""


class _Measuring:
    """What has been measured of a case, and how one more sample is."""

    def __init__(self, case: Case, base: str, plan: RoundsPlan, start: StartMeasurer, report: Report) -> None:
        self.case, self.base, self.plan, self.start, self.report = case, base, plan, start, report
        self.budget = Budget(plan.seconds, len(case.contestants))
        self.draws = random.Random(plan.seed)
        self.absent = list(case.absent)
        self.samples: dict[str, list[float]] = {contestant.name: [] for contestant in case.contestants}
        self.beside: dict[str, list[float]] = {}
        self.costs: dict[str, Cost | None] = {}
        self.late = False

    def result(self) -> CaseResult:
        """Measures."""
        self.measure()
        samples = {name: values for name, values in self.samples.items() if values}
        shown = tuple(entry for entry in self.absent if not entry.name.endswith(AGAIN))
        base = self.base if self.base in samples else None
        return CaseResult(self.case, base, samples, self.beside, self.costs, shown, self.late)

    def measure(self) -> None:
        raise NotImplementedError

    def leave_out(self, name: str, why: str) -> None:
        """`name` is not measured; without a base, there is nothing to be compared with."""
        if name == self.base:
            raise _BaseFailed(why)
        self.absent.append(Absent(name, why))
        self.samples[name] = []

    def say(self, number: int, name: str) -> None:
        self.report(f"{self.case.title}: {_round(number, self.plan)}, {name}")


class _Bouts(_Measuring):
    """The base against each of the others in turn, in processes that wait for each other."""

    def measure(self) -> None:
        by_name = {contestant.name: contestant for contestant in self.case.contestants}
        names = [name for name in by_name if name != self.base]
        soft, hard = self.budget.next_part()
        with closing(self.start(by_name[self.base].prepare)) as measurer:
            try:
                self.warm_up(self.base, measurer, soft, hard)
            except ContestantFailed as failure:
                self.leave_out(self.base, str(failure))
            # The base beside itself comes last: where time is short, its rivals are worth more.
            for name in sorted(names, key=lambda name: name.endswith(AGAIN)):
                soft, hard = self.budget.next_part()
                if monotonic() >= hard:
                    self.leave_out(name, NO_TIME)
                    continue
                with closing(self.start(by_name[name].prepare)) as other:
                    try:
                        self.warm_up(name, other, soft, hard)
                        self.rounds({self.base: measurer, name: other}, soft, hard)
                    except ContestantFailed as failure:
                        self.leave_out(name, str(failure))
            if not self.samples[self.base]:
                try:
                    self.rounds({self.base: measurer}, self.budget.end, self.budget.end)
                except ContestantFailed as failure:
                    self.leave_out(self.base, str(failure))

    def warm_up(self, name: str, measurer: Measurer, soft: float, hard: float) -> None:
        """Get it ready, and drop its first samples."""
        self.report(f"{self.case.title}: preparing {name}")
        self.costs[name] = measurer.cost(hard)
        for number in range(-self.plan.warmup, 0):
            if number == -self.plan.warmup or monotonic() < soft:
                self.say(number, name)
                measurer.sample(hard)

    def rounds(self, measurers: dict[str, Measurer], soft: float, hard: float) -> None:
        """As many rounds of these as are planned and fit; raises `ContestantFailed` where the contestant does."""
        *_, name = measurers
        longest = 0.0
        found: dict[str, list[float]] = {who: [] for who in measurers}
        for number in range(self.plan.rounds):
            began = monotonic()
            try:
                if began + longest >= (hard if number < LEAST_ROUNDS else soft):
                    raise TimeUp
                sampled = self.one_round(number, measurers, hard)
            except TimeUp:
                self.late = True
                break
            for who, value in sampled.items():
                found[who].append(value)
            longest = max(longest, monotonic() - began)
        if not found[name]:
            raise TimeUp
        self.samples[self.base] += found[self.base]
        self.samples[name] = self.samples[name] if name == self.base else found[name]
        self.beside[name] = found[self.base]

    def one_round(self, number: int, measurers: dict[str, Measurer], hard: float) -> dict[str, float]:
        """A sample of each; whoever misses a round cannot be paired."""
        sampled = {}
        for who in self.draws.sample(list(measurers), len(measurers)):
            self.say(number, who)
            try:
                # A base that was not waited for could not go on with the next contestant.
                sampled[who] = measurers[who].sample(self.budget.end if who == self.base else hard)
            except TimeUp:
                raise
            except ContestantFailed as failure:
                if who == self.base:
                    raise _BaseFailed(str(failure)) from None
                raise
        return sampled


class _Fresh(_Measuring):
    """All of them in each round, one after the other, each sample in a process of its own."""

    def measure(self) -> None:
        by_name = {contestant.name: contestant for contestant in self.case.contestants}
        longest = 0.0
        for number in range(self.plan.rounds):
            began = monotonic()
            if number and began + longest > self.budget.end:
                self.late = True
                break
            taking_part = [name for name in by_name if len(self.samples[name]) == number]
            for name in self.draws.sample(taking_part, len(taking_part)):
                self.say(number, name)
                try:
                    self.samples[name].append(self.once(by_name[name], first=not number))
                except TimeUp as failure:
                    self.late = True
                    if not number:
                        self.leave_out(name, str(failure))
                except ContestantFailed as failure:
                    self.leave_out(name, str(failure))
            longest = max(longest, monotonic() - began)
        measured = {name: values for name, values in self.samples.items() if values}
        rounds = min(map(len, measured.values()), default=0)
        self.samples = {name: values[:rounds] for name, values in measured.items()}
        self.beside = dict.fromkeys(self.samples, self.samples[self.base]) if self.base in self.samples else {}

    def once(self, contestant: Contestant, *, first: bool) -> float:
        """One sample; the first one of each has its share of the time."""
        hard = self.budget.next_part()[1] if first else self.budget.end
        with closing(self.start(contestant.prepare)) as measurer:
            measurer.cost(hard)
            return measurer.sample(hard)


def _with_twin(case: Case, plan: RoundsPlan) -> tuple[Case, str]:
    """The case with its base measured twice, and the name of that."""
    names = [contestant.name for contestant in case.contestants]
    offered = [contestant.name for contestant in case.contestants if contestant.base] or names
    base = plan.base if plan.base in names else offered[0]
    assert base is not None
    if not plan.twin:
        return case, base
    place = names.index(base)
    twin = Contestant(f"{base}{AGAIN}", case.contestants[place].prepare)
    contestants = (*case.contestants[: place + 1], twin, *case.contestants[place + 1 :])
    return replace(case, contestants=contestants), base


def _round(number: int, plan: RoundsPlan) -> str:
    return "warm-up" if number < 0 else f"round {number + 1} of {plan.rounds}"
