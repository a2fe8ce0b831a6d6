"""A campaign of faults: every fault on every kind of run, and what came of each."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitransformer.processes import one_line
from minitransformer.reliability.disturbed_runs import (
    EQUAL,
    FAILED_CASE,
    NEAR,
    REFUSED,
    Broken,
    DisturbedRun,
    Reference,
    RunKind,
)
from minitransformer.reliability.faults import Fault
from minitransformer.reliability.launcher import Commands

LETTERS = {EQUAL: "=", NEAR: "≈", REFUSED: "r", FAILED_CASE: "FAILED"}


@dataclass(frozen=True)
class FaultOutcome:
    """What came of a fault: "equal" to the uninterrupted run, "near", "refused" in one sentence, or "failed"."""

    fault: str
    kind: str
    seed: int
    result: str
    reason: str = ""
    """why it failed"""
    folder: str = ""
    """what a failure has left"""


class Campaign:
    """`count` cases of each fault and kind of run, in `folder`; each case depends on `seed` and its number."""

    def __init__(
        self, commands: Commands, kinds: Sequence[RunKind], faults: Sequence[type[Fault]], folder: Path
    ) -> None:
        self.commands, self.kinds, self.faults, self.folder = commands, kinds, faults, folder
        self._references: dict[str, Reference] = {}

    def outcomes(self, fault: type[Fault], count: int, seed: int) -> Iterator[FaultOutcome]:
        """Those of one fault, kind by kind."""
        for kind in self.kinds:
            if can_disturb(fault, kind):
                yield from (self.outcome(fault, kind, seed + number) for number in range(count))

    def outcome(self, fault: type[Fault], kind: RunKind, seed: int) -> FaultOutcome:
        if kind.name not in self._references:
            place = self.folder / "uninterrupted" / kind.name.replace(" ", "-")
            self._references[kind.name] = Reference(self.commands, kind, place)
        folder = self.folder / f"{fault.name}-{kind.name.replace(' ', '-')}-{seed}"
        case = DisturbedRun(self._references[kind.name], folder, random.Random(f"{fault.name}, {kind.name}, {seed}"))
        try:
            result = fault().try_on(case)
        except Broken as error:
            return FaultOutcome(fault.name, kind.name, seed, FAILED_CASE, str(error), str(folder))
        except Exception as error:  # such as a checkpoint that cannot be read
            return FaultOutcome(fault.name, kind.name, seed, FAILED_CASE, one_line(error), str(folder))
        shutil.rmtree(folder)
        return FaultOutcome(fault.name, kind.name, seed, result)


def can_disturb(fault: type[Fault], kind: RunKind) -> bool:
    return fault.why_not() is None and (kind.ranks > 1 or not fault.of_a_rank)


def cell(outcomes: Sequence[FaultOutcome], fault: type[Fault], kind: RunKind) -> str:
    """How often each result came of `fault` on `kind`, such as "3= 1r"."""
    counts = Counter(each.result for each in outcomes if (each.fault, each.kind) == (fault.name, kind.name))
    return " ".join(f"{counts[result]}{letter}" for result, letter in LETTERS.items() if counts[result]) or "-"
