"""Items, the units of an evaluation: what was counted of each, their totals, and totals of items drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.intervals import RESAMPLES, Counts

Column = npt.NDArray[Any]


@dataclass
class Totals:
    """Totals over the items of a split; None for what is not measured."""

    nats: float = 0.0
    targets: int = 0
    tokens: int = 0
    """tokens that were read"""
    correct: int | None = None
    """correctly predicted targets"""
    texts: int = 0
    exact: int = 0
    """exact matches: texts with all targets correct"""
    bytes: float | None = None
    """bytes of text in the targets"""
    majority_baseline: float | None = None
    confusion: Counts | None = None
    """[classes, predicted classes] texts"""
    token_f1: float | None = None
    """sum over the texts, which are generated answers"""
    calibration: Column | None = None
    """[bins] correct texts less the sum of their confidences, by confidence"""
    choices: int = 0
    """multiple-choice items"""
    chosen: float | None = None
    """of which the right candidate was chosen; among n that tie, 1/n"""
    bleu: Column | None = None
    """[statistics] of sacrebleu"""
    chrf: Column | None = None
    """[statistics] of sacrebleu"""

    def add(self, items: Items) -> None:
        """Add the totals of `items`."""
        more = items.totals()
        for name in (each.name for each in fields(self)):
            old, new = getattr(self, name), getattr(more, name)
            if new is not None:
                setattr(self, name, new if old is None else old + new)


@dataclass(frozen=True)
class Items:
    """What was counted of each item, such as a labelled text, a pair, a conversation or a window of text.

    `columns` [items] or [items, n] add up to the fields of `Totals` that they are named after. A text of class i that
    was predicted to be of class j is in cell i · classes + j.
    """

    columns: Mapping[str, Column]
    cells: Counts | None = None
    classes: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, places: Any) -> Items:
        """The items at `places`, a slice, a mask or numbers."""
        columns = {name: column[places] for name, column in self.columns.items()}
        cells = None if self.cells is None else self.cells[places]
        return Items(columns, cells, self.classes)

    def totals(self, weights: npt.NDArray[np.int64] | None = None) -> Totals:
        """The totals, in which each item counts as often as its weight says, or once."""
        sums: dict[str, Any] = {}
        for name, column in self.columns.items():
            total = column.sum(0) if weights is None else np.tensordot(weights, column, 1)
            sums[name] = total if column.ndim > 1 else total.item()
        if self.cells is not None:
            counts = np.bincount(self.cells, weights, self.classes**2).astype(np.int64)
            sums["confusion"] = counts.reshape(self.classes, self.classes)
        return Totals(**sums)


def join_items(parts: Sequence[Items]) -> Items:
    """The items of all parts, one after the other."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    first = parts[0]
    cells = None if first.cells is None else np.concatenate([part.cells for part in parts if part.cells is not None])
    return Items(columns, cells, first.classes)


def resampled_weights(count: int, stream: int = 0) -> Iterator[npt.NDArray[np.int64]]:
    """How often each of `count` items is drawn in a sample of as many with replacement.

    They are the same for the same count and stream of random numbers, so that two models are compared on the same
    samples. Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    generator = np.random.default_rng([0, stream])
    for _ in range(RESAMPLES):
        yield np.bincount(generator.integers(count, size=count), minlength=count)
