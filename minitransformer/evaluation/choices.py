"""Accuracy of choosing the likeliest candidate, by several normalisations of its likelihood."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.intervals import Bounds, wilson_interval
from minitransformer.evaluation.items import Items
from minitransformer.registry import Registered


class ScoredCandidate(NamedTuple):
    """log p(candidate | context) in nats, the size of the candidate, and log p(candidate) without the context."""

    nats: float
    num_tokens: int
    num_bytes: int
    unconditional_nats: float | None = None
    """None if there is no context"""


class Normalisation(Registered, kind="normalisation"):
    """A score of candidates of different lengths, of which the highest is chosen."""

    label: str
    needs_context = False
    """whether it is undefined for candidates without a context"""

    @staticmethod
    def score(candidate: ScoredCandidate) -> float:
        raise NotImplementedError


class Sum(Normalisation, name="sum"):
    """log p(candidate | context)."""

    label = "sum"

    @staticmethod
    def score(candidate: ScoredCandidate) -> float:
        return candidate.nats


class ByToken(Normalisation, name="token"):
    """log p(candidate | context) / its tokens. Brown et al. 2020 (GPT-3, arXiv 2005.14165), section 2.4."""

    label = "mean by token"

    @staticmethod
    def score(candidate: ScoredCandidate) -> float:
        return candidate.nats / candidate.num_tokens


class ByByte(Normalisation, name="byte"):
    """log p(candidate | context) / its bytes, which no tokenizer changes: acc_bytes of lm-evaluation-harness."""

    label = "mean by byte"

    @staticmethod
    def score(candidate: ScoredCandidate) -> float:
        return candidate.nats / candidate.num_bytes


class LessUnconditional(Normalisation, name="unconditional"):
    """log p(candidate | context) − log p(candidate), the pointwise mutual information. GPT-3, section 2.4."""

    label = "less unconditional"
    needs_context = True

    @staticmethod
    def score(candidate: ScoredCandidate) -> float:
        assert candidate.unconditional_nats is not None, "no context to leave out"
        return candidate.nats - candidate.unconditional_nats


class ScoredItem(NamedTuple):
    """The candidates of an item, the place of the right one, and the name of the item's group."""

    candidates: tuple[ScoredCandidate, ...]
    answer: int
    group: str = ""


def choice_items(items: Sequence[ScoredItem], normalisation: type[Normalisation]) -> Items:
    """What is counted of each item by a normalisation."""
    return Items({"choices": np.ones(len(items), np.int64), "chosen": right_shares(items, normalisation)})


def candidate_probabilities(item: ScoredItem) -> npt.NDArray[np.float64]:
    """[candidates] the probabilities of the candidates among themselves, by the sum of their tokens."""
    nats = np.array([candidate.nats for candidate in item.candidates])
    shares = np.exp(nats - nats.max())
    return shares / shares.sum()


@dataclass(frozen=True)
class ChoiceAccuracy:
    """Of `items`, those that were answered right; `ties` are those in which several candidates were the likeliest."""

    items: int
    right: float
    ties: int

    @property
    def value(self) -> float:
        return self.right / self.items

    @property
    def interval(self) -> Bounds:
        """The 95% score interval, which is no narrower for ties than for other items."""
        return wilson_interval(self.right, self.items)

    def to_json(self) -> dict[str, Any]:
        return {"accuracy": self.value, "interval": list(self.interval), "items": self.items, "ties": self.ties}


def likeliest(item: ScoredItem, normalisation: type[Normalisation]) -> list[int]:
    """The places of the candidates with the highest score: several if they tie."""
    scores = [normalisation.score(candidate) for candidate in item.candidates]
    return [place for place, score in enumerate(scores) if score == max(scores)]


def right_shares(items: Sequence[ScoredItem], normalisation: type[Normalisation]) -> npt.NDArray[np.float64]:
    """[items] 1 where the right candidate is the likeliest one; among n that tie 1/n; and 0."""
    chosen = (likeliest(item, normalisation) for item in items)
    shares = [(item.answer in places) / len(places) for item, places in zip(items, chosen, strict=True)]
    return np.array(shares, np.float64)


def accuracy(items: Sequence[ScoredItem], normalisation: type[Normalisation]) -> ChoiceAccuracy:
    """The share of items whose right candidate is the likeliest one; among n that tie it counts 1/n, ½ of two.

    That is the expected value of choosing one of them at random, so that a model that tells nothing apart has the
    accuracy of chance.
    """
    ties = sum(len(likeliest(item, normalisation)) > 1 for item in items)
    return ChoiceAccuracy(len(items), float(right_shares(items, normalisation).sum()), ties)


def defined_normalisations(items: Sequence[ScoredItem]) -> dict[str, type[Normalisation]]:
    """Every normalisation that is defined for all `items`."""
    have_context = all(each.unconditional_nats is not None for item in items for each in item.candidates)
    return {name: each for name, each in Normalisation.registry.items() if have_context or not each.needs_context}


def accuracies(items: Sequence[ScoredItem]) -> dict[str, ChoiceAccuracy]:
    """The accuracy by every normalisation that is defined for all `items`."""
    return {name: accuracy(items, each) for name, each in defined_normalisations(items).items()}


def chance(items: Sequence[ScoredItem]) -> float:
    """The expected accuracy of choosing at random."""
    return sum(1 / len(item.candidates) for item in items) / len(items)


def by_group(items: Iterable[ScoredItem]) -> Mapping[str, list[ScoredItem]]:
    """The items of each group, sorted by its name."""
    found: dict[str, list[ScoredItem]] = {}
    for item in items:
        found.setdefault(item.group, []).append(item)
    return dict(sorted(found.items()))
