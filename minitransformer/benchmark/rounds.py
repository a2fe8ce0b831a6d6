"""Rounds: in each, the base and one contestant are measured once, in random order.

Only these two processes exist at a time, because memory may not suffice for all contestants of a case.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol

from minitransformer.benchmark.case import Absent, Case, Contestant, Cost, Work
from minitransformer.benchmark.statistics import Ratio, Spread, Verdict, compare_rounds, median_interval
from minitransformer.benchmark.workers import NO_TIME, ContestantFailed, TimeUp, Worker

AGAIN = " (again)"
"""suffix of the base measured as its own contestant, which shows the noise"""
LEAST_ROUNDS = 3
"""minimum rounds, for which a contestant may take twice its share of the time"""

LEAST_SECONDS = 20.0
"""minimum seconds of a part, while they last: less is not enough to import torch"""


class Budget:
    """`seconds` from now on for `parts` in sequence.

    Each may take its share of the rest when it starts, and twice that for preparation and a minimum of rounds;
    unused time is left to the others. If the shares are too short, the first parts take what they need, and the last
    ones get nothing.
    """

    def __init__(self, seconds: float, parts: int) -> None:
        self.end = monotonic() + seconds
        self.parts = parts

    def next_part(self) -> tuple[float, float]:
        """The soft and the hard deadline of the part that starts now."""
        now = monotonic()
        share = (self.end - now) / self.parts
        self.parts = max(1, self.parts - 1)
        return min(self.end, now + max(share, LEAST_SECONDS)), min(self.end, now + max(2 * share, LEAST_SECONDS))


class Measurer(Protocol):
    """A prepared contestant."""

    def cost(self, deadline: float = math.inf) -> Cost | None: ...

    def sample(self, deadline: float = math.inf) -> float: ...

    def close(self) -> None: ...


StartMeasurer = Callable[[Callable[[], Work]], Measurer]
Report = Callable[[str], None]


@dataclass(frozen=True)
class RoundsPlan:
    """How often to measure, and the baseline."""

    rounds: int = 11
    warmup: int = 2
    """warm-up samples per contestant, which are discarded: they fill caches and compile"""
    base: str | None = None
    """baseline, where it takes part; None is the first that a case offers"""
    twin: bool = True
    """measure the base a second time as its own contestant, to estimate the noise"""
    seconds: float = math.inf
    """time limit of a case, from the start of its first process"""
    seed: int = 0


@dataclass(frozen=True)
class CaseResult:
    """The samples of a case by contestant, paired with those of the base, and their statistics."""

    case: Case
    base: str | None
    samples: dict[str, list[float]]
    """samples by contestant; of the base, those of all rounds"""
    beside: dict[str, list[float]] = field(default_factory=dict)
    """by contestant, the paired samples of the base"""
    costs: dict[str, Cost | None] = field(default_factory=dict)
    absent: tuple[Absent, ...] = ()
    late: bool = False
    """whether the time limit left fewer rounds than planned"""

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratios(self, name: str) -> list[float]:
        """Ratio to the base in each round; above 1 is better."""
        pairs = zip(self.samples[name], self.beside.get(name, self.samples[name]), strict=True)
        return [theirs / ours if self.case.lower_is_better else ours / theirs for ours, theirs in pairs]

    def ratio(self, name: str) -> Ratio:
        """The median of `ratios`, with its interval."""
        return median_interval(self.ratios(name))

    @property
    def floor(self) -> float:
        """The ratio of the base to itself (noise), which a winner must exceed; 1 if it was not measured."""
        twin = f"{self.base}{AGAIN}"
        if twin not in self.samples:
            return 1.0
        median = self.ratio(twin).median
        return max(median, 1 / median)

    def verdict(self) -> Verdict | None:
        """The verdict by ratios to the base, over the rounds that all have; None without measurements."""
        rivals = {name: self.ratios(name) for name in self.samples if not name.endswith(AGAIN)}
        if not rivals:
            return None
        rounds = min(len(values) for values in rivals.values())
        return compare_rounds({name: row[:rounds] for name, row in rivals.items()}, self.floor)


def measure(
    case: Case, plan: RoundsPlan, *, start: StartMeasurer = Worker, report: Report = lambda line: None
) -> CaseResult:
    """Measure all contestants within the time limit; the others are absent, with the reason.

    If the base fails, the next one replaces it. No contestant's process is left when this returns, even after Ctrl-C.
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
    """The base cannot be measured."""


class _Measuring:
    """The state of measuring a case."""

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
        """Mark `name` as absent; raises if it is the base."""
        if name == self.base:
            raise _BaseFailed(why)
        self.absent.append(Absent(name, why))
        self.samples[name] = []

    def say(self, number: int, name: str) -> None:
        self.report(f"{self.case.title}: {_round(number, self.plan)}, {name}")


class _Bouts(_Measuring):
    """The base against each contestant in turn, in processes that take turns."""

    def measure(self) -> None:
        by_name = {contestant.name: contestant for contestant in self.case.contestants}
        names = [name for name in by_name if name != self.base]
        soft, hard = self.budget.next_part()
        with closing(self.start(by_name[self.base].prepare)) as measurer:
            try:
                self.warm_up(self.base, measurer, soft, hard)
            except ContestantFailed as failure:
                self.leave_out(self.base, str(failure))
            # The second measurement of the base is last: if time is short, its rivals matter more.
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
        """Prepare it, and discard its first samples."""
        self.report(f"{self.case.title}: preparing {name}")
        self.costs[name] = measurer.cost(hard)
        for number in range(-self.plan.warmup, 0):
            if number == -self.plan.warmup or monotonic() < soft:
                self.say(number, name)
                measurer.sample(hard)

    def rounds(self, measurers: dict[str, Measurer], soft: float, hard: float) -> None:
        """As many planned rounds as fit; raises `ContestantFailed` if the contestant fails."""
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
        """One sample of each; both are needed for a pair."""
        sampled = {}
        for who in self.draws.sample(list(measurers), len(measurers)):
            self.say(number, who)
            try:
                # A base with a pending answer could not continue with the next contestant.
                sampled[who] = measurers[who].sample(self.budget.end if who == self.base else hard)
            except TimeUp:
                raise
            except ContestantFailed as failure:
                if who == self.base:
                    raise _BaseFailed(str(failure)) from None
                raise
        return sampled


class _Fresh(_Measuring):
    """All contestants in each round, each sample in a new process."""

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
        """One sample; the first one of each is limited to its share of the time."""
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
