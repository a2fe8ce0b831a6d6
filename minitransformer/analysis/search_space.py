"""The search space of a sweep: settings, combinations of their values, and the rungs of successive halving.

Grid search, random search (Bergstra and Bengio 2012, JMLR 13) and successive halving (Jamieson and Talwalkar 2016,
arXiv 1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np

from minitransformer.analysis.verdicts import choice_text
from minitransformer.errors import UserError
from minitransformer.tasks.task import canonical

ATTEMPTS = 100
"""draws per requested combination before the search space counts as exhausted"""

Value: TypeAlias = bool | int | float | str | None
Combination: TypeAlias = dict[str, Value]
"""a value for each swept setting"""


@dataclass(frozen=True)
class Values:
    """A setting with a list of values."""

    name: str
    values: tuple[Value, ...]

    def draw(self, generator: np.random.Generator) -> Value:
        return self.values[generator.integers(len(self.values))]

    def __str__(self) -> str:
        return ", ".join(value_text(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """A setting drawn from a closed range.

    Integers are uniform; floats are uniform, or log-uniform if the ends are positive and at least
    ten times apart, rounded to three digits.
    """

    name: str
    low: float
    high: float

    @property
    def is_logarithmic(self) -> bool:
        return not isinstance(self.low, int) and 0 < 10 * self.low <= self.high

    def draw(self, generator: np.random.Generator) -> Value:
        if isinstance(self.low, int):
            return int(generator.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.is_logarithmic else (self.low, self.high)
        drawn = float(generator.uniform(low, high))
        rounded = float(f"{math.exp(drawn) if self.is_logarithmic else drawn:.3g}")
        return min(max(rounded, self.low), self.high)

    def __str__(self) -> str:
        return f"{value_text(self.low)} to {value_text(self.high)}{', logarithmic' * self.is_logarithmic}"


SweptSetting: TypeAlias = Values | Range


def grid(settings: Sequence[SweptSetting]) -> list[Combination]:
    """All combinations, with the last setting varying fastest. Raises `UserError` for a range."""
    for setting in settings:
        if isinstance(setting, Range):
            raise UserError(f"{setting.name} is a range, {setting}: draw from it with --random N, or list its values")
    names = [setting.name for setting in settings]
    values = [setting.values for setting in settings if isinstance(setting, Values)]
    return [dict(zip(names, row, strict=True)) for row in product(*values)]


def draws(settings: Sequence[SweptSetting], count: int, seed: int) -> list[Combination]:
    """`count` distinct random combinations; a smaller `count` gives a prefix of these.

    Raises `UserError` if there are fewer.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, Combination] = {}
    for _ in range(ATTEMPTS * count):
        combination = {setting.name: setting.draw(generator) for setting in settings}
        drawn.setdefault(canonical(combination), combination)
        if len(drawn) == count:
            return list(drawn.values())
    raise UserError(f"--random {count} finds only {len(drawn)} distinct combinations: ask for fewer, or widen --set")


def rungs(steps: int, count: int, factor: int, eval_every: int) -> list[int]:
    """The steps at which the best 1/`factor` of `count` combinations continue, up to `steps`.

    All are multiples of the first, which is a multiple of `eval_every` unless that is larger. Raises `UserError` for
    fewer combinations than `factor`, or too few steps to share.
    """
    if count < factor:
        raise UserError(f"--halving {factor} keeps one combination in {factor}, and there are only {count}: give more")
    number = 1
    while factor**number <= count:
        number += 1
    first = steps // factor ** (number - 1)
    if first < 1:
        raise UserError(f"{steps} steps are too few to halve {count} combinations by {factor}: raise --steps")
    if first > eval_every:
        first -= first % eval_every
    return [*(first * factor**rung for rung in range(number - 1)), steps]


def value_text(value: Value) -> str:
    """The value as typed on the command line."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(combination: Combination) -> str:
    """The combination in words."""
    return ", ".join(choice_text(name, value_text(value)) for name, value in combination.items())
