"""How texts that a model meets in use differ from those that it was validated on: their loss, and their length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.estimates import SMALL, Estimate, Samples
from minitransformer.evaluation.items import resampled_weights

RANGES = np.unique(np.floor(1.25 ** np.arange(100)).astype(np.int64))
"""first positions of the ranges whose tokens are compared with each other"""
Weights = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextLosses:
    """Of each text, the nats and the number of its tokens in each range of positions, and its length in tokens."""

    nats: Samples
    """[texts, ranges]"""
    targets: Samples
    """[texts, ranges]"""
    lengths: Samples
    """[texts]"""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of_texts(cls, texts: Sequence[tuple[int, Sequence[float]]], lengths: Sequence[int]) -> TextLosses:
        """From the position of each text's first predicted token, at least 1, and the nats of the tokens from there."""
        nats, targets = np.zeros((2, len(texts), len(RANGES)))
        for number, (first, of_tokens) in enumerate(texts):
            where = np.searchsorted(RANGES, np.arange(first, first + len(of_tokens)), side="right") - 1
            np.add.at(nats[number], where, of_tokens)
            np.add.at(targets[number], where, 1.0)
        return cls(nats, targets, np.array(lengths, np.float64))


@dataclass(frozen=True)
class Drift:
    """Texts in use beside validation texts: the value of each, and the first less the second."""

    loss: tuple[Estimate, Estimate, Estimate]
    """nats per token; of validation texts, at the positions of the tokens in use"""
    length: tuple[Estimate, Estimate, Estimate]
    """mean tokens of a text"""
    compared: float
    """share of the tokens in use that stand where validation texts have enough of them to compare"""

    def to_json(self) -> dict[str, Any]:
        names = ("in_use", "validation", "difference")
        parts = {"loss": self.loss, "length": self.length}
        found = {what: dict(zip(names, (each.to_json() for each in of), strict=True)) for what, of in parts.items()}
        return {**found, "compared": self.compared}


def drift_between(used: TextLosses, usual: TextLosses) -> Drift | None:
    """How `used` differs from `usual`, with bootstrap intervals over the texts of both.

    A token with more before it is easier to predict, and texts in use are shorter or longer than validation texts.
    Hence direct standardisation: Σᵣ nᵣ · lossᵣ / Σᵣ nᵣ, with the losses of validation tokens in each range r of
    positions and the numbers n of tokens in use. None where no range has `SMALL` tokens of `usual`.
    """
    kept = usual.targets.sum(0) >= SMALL
    compared = float(used.targets[:, kept].sum() / max(used.targets.sum(), 1))
    if not compared:
        return None

    def losses(weights: Weights, others: Weights) -> tuple[float, float]:
        mine, its = used.targets[:, kept], usual.targets[:, kept]
        counts = weights @ mine
        by_range = (others @ usual.nats[:, kept]) / np.maximum(others @ its, 1)
        total = max(counts.sum(), 1)
        return float((weights @ used.nats[:, kept]).sum() / total), float(counts @ by_range / total)

    def lengths(weights: Weights, others: Weights) -> tuple[float, float]:
        return float(weights @ used.lengths / len(used)), float(others @ usual.lengths / len(usual))

    return Drift(_estimates(losses, len(used), len(usual)), _estimates(lengths, len(used), len(usual)), compared)


def _estimates(
    pair: Callable[[Weights, Weights], tuple[float, float]], count: int, other: int
) -> tuple[Estimate, Estimate, Estimate]:
    """Both values of `pair` and their difference; None for the intervals of a single text."""
    values = np.array(pair(np.ones(count, np.int64), np.ones(other, np.int64)))
    draws = zip(resampled_weights(count, 1), resampled_weights(other, 2), strict=True)
    drawn = np.array([pair(*weights) for weights in draws])
    low, high = np.quantile(np.column_stack([drawn, drawn[:, 0] - drawn[:, 1]]), (0.025, 0.975), axis=0)
    found = [*values.tolist(), float(values[0] - values[1])]
    known = (count > 1, other > 1, min(count, other) > 1)
    first, second, difference = (
        Estimate(value, (float(low[i]), float(high[i])) if known[i] else None) for i, value in enumerate(found)
    )
    return first, second, difference
