"""Counterfactual texts: the same text with one word exchanged, and how much an answer changes by it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.evaluation.answers import token_f1
from minitransformer.evaluation.estimates import SMALL, Estimate
from minitransformer.evaluation.items import resampled_weights
from minitransformer.records import shown

SHIPPED = Path(__file__).with_name("exchanges.tsv")
HEADER = ["kind", "word", "other"]


class Exchange(NamedTuple):
    """A word, another one in its place, and the kind of both, such as names."""

    kind: str
    word: str
    other: str

    def applied(self, text: str) -> str:
        """`text` with the other word at every place of this one, which begins with a capital where this one does.

        In a text without capitals, names have none either.
        """
        word, other = (self.word.lower(), self.other.lower()) if text.islower() else (self.word, self.other)
        return _pattern(word).sub(lambda found: _like(found[0], other), text)


class Variant(NamedTuple):
    """The number of an item, and the exchange that changes it."""

    item: int
    exchange: Exchange


@cache
def _pattern(word: str) -> re.Pattern[str]:
    first = re.escape(word[0])
    either = f"[{re.escape(word[0].lower())}{re.escape(word[0].upper())}]" if word[0].islower() else first
    return re.compile(rf"(?<!\w){either}{re.escape(word[1:])}(?!\w)")


def _like(found: str, word: str) -> str:
    return word[0].upper() + word[1:] if found[0].isupper() else word


def read_exchanges(path: Path = SHIPPED) -> list[Exchange]:
    """The exchanges of a .tsv file with the columns kind, word and other; by default those of the package.

    Raises `UserError` with the line of any other row.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}): name a .tsv file of exchanges") from None
    if not lines or lines[0].split("\t") != HEADER:
        raise UserError(f"{path} begins with {shown(lines[:1])}: its first line must be kind, tab, word, tab, other")
    found = []
    for number, line in enumerate(lines[1:], start=2):
        values = [value.strip() for value in line.split("\t")]
        if not line.strip():
            continue
        if len(values) != len(HEADER) or not all(values) or values[1] == values[2]:
            raise UserError(f"{path} line {number} is {shown(line)}: give a kind, a word and another word, by tabs")
        found.append(Exchange(*values))
    if not found:
        raise UserError(f"{path} has no exchanges: give a kind, a word and another word in each line")
    return found


def variants_of(texts: Sequence[str], exchanges: Sequence[Exchange]) -> Iterator[tuple[Variant, str]]:
    """Every text with every exchange that changes it."""
    for number, text in enumerate(texts):
        for exchange in exchanges:
            if (changed := exchange.applied(text)) != text:
                yield Variant(number, exchange), changed


@dataclass(frozen=True)
class Change:
    """What became of a prediction: whether it is another one, how much from 0 to 1, and the shift of probabilities."""

    is_other: bool
    amount: float
    shift: npt.NDArray[np.float64] | None = None


def change_of_class(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], *, named: bool = True) -> Change:
    """Between probabilities [classes]: whether the likeliest differs, and their total variation ½ Σ |p − q|.

    Classes that are not `named`, as the candidates of a question, have no shift over several texts.
    """
    shift = after - before
    amount = float(np.abs(shift).sum() / 2)
    return Change(bool(before.argmax() != after.argmax()), amount, shift if named else None)


def change_of_text(before: str, after: str, exchange: Exchange) -> Change:
    """Between generated texts: whether they differ but for the word itself, and 1 − the F1 of their words."""
    expected = exchange.applied(before)
    return Change(after.strip() != expected.strip(), 1 - token_f1(after, expected))


@dataclass(frozen=True)
class Sensitivity:
    """How a model takes the exchanges of one kind: over `variants` of `texts`."""

    name: str
    texts: int
    variants: int
    changed: Estimate
    amount: Estimate
    shift: dict[str, Estimate]
    """of the mean probability of each class"""

    @property
    def is_small(self) -> bool:
        return self.texts < SMALL

    def to_json(self) -> dict[str, Any]:
        numbers = {"texts": self.texts, "variants": self.variants, "small": self.is_small}
        shift = {name: each.to_json() for name, each in self.shift.items()}
        return {**numbers, "changed": self.changed.to_json(), "amount": self.amount.to_json(), "shift": shift}


def sensitivity(name: str, found: Sequence[tuple[Variant, Change]], classes: Sequence[str] = ()) -> Sensitivity:
    """Means over variants, with bootstrap intervals over texts, of which each may have several variants."""
    _, places = np.unique([variant.item for variant, _ in found], return_inverse=True)
    rows = [[1.0, each.is_other, each.amount, *([] if each.shift is None else each.shift)] for _, each in found]
    of_variants = np.array(rows)
    of_texts = np.zeros((places.max() + 1, of_variants.shape[1]))
    np.add.at(of_texts, places, of_variants)
    sums = np.array([weights @ of_texts for weights in resampled_weights(len(of_texts))])
    lows, highs = np.quantile(sums[:, 1:] / sums[:, :1], (0.025, 0.975), axis=0).tolist()
    means = of_variants[:, 1:].mean(0).tolist()
    bounds = [None if len(of_texts) < 2 else each for each in zip(lows, highs, strict=True)]
    changed, amount, *shifts = map(Estimate, means, bounds)
    named = dict(zip(classes, shifts, strict=True)) if shifts else {}
    return Sensitivity(name, len(of_texts), len(found), changed, amount, named)
