"""Batches of pairs of similar length: shuffled for training, sequential for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from minitransformer.text.batches import IGNORE, Batches, TrainingBatch
from minitransformer.text.token_files import Ragged, TokenPairs

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairBatch(TrainingBatch):
    """Sources, target inputs, and for each input position the next target token, or IGNORE.

    Inputs start with the start token; sources and targets end with the end token.
    """

    source: Int64[Tensor, "batch source"]
    source_is_token: Bool[Tensor, "batch source"]
    inputs: Int64[Tensor, "batch target"]
    targets: Int64[Tensor, "batch target"]

    @property
    def item_tokens(self) -> Tensor:
        """[batch] tokens of source and target, without padding."""
        return self.source_is_token.sum(1) + (self.targets != IGNORE).sum(1)


class Gathered(NamedTuple):
    """Padded texts, [b, longest + 1] each: ids (0 at padding), which are tokens, and the position after each text."""

    ids: Integers
    is_token: npt.NDArray[np.bool_]
    is_end: npt.NDArray[np.bool_]


def gathered(texts: Ragged, rows: Integers) -> Gathered:
    """The `rows` [b] of `texts`."""
    lengths = texts.lengths[rows, None]
    columns = np.arange(lengths.max(initial=0) + 1)
    is_token = columns < lengths
    ids = np.zeros(is_token.shape, np.int64)
    ids[is_token] = texts.tokens[(texts.offsets[rows, None] + columns)[is_token]]
    return Gathered(ids, is_token, columns == lengths)


def batch_of(pairs: TokenPairs, rows: Integers, source_end: int, target_end: int, start: int | None) -> PairBatch:
    """The pairs `rows` [b] with end tokens; inputs start with `start`, or the targets' end token."""
    first = target_end if start is None else start
    source, target = gathered(pairs.sources, rows), gathered(pairs.targets, rows)
    return PairBatch(
        torch.from_numpy(np.where(source.is_end, source_end, source.ids)),
        torch.from_numpy(source.is_token | source.is_end),
        torch.from_numpy(np.pad(target.ids, ((0, 0), (1, 0)), constant_values=first)[:, :-1].copy()),
        torch.from_numpy(np.where(target.is_end, target_end, np.where(target.is_token, target.ids, IGNORE))),
    )


class Layout(NamedTuple):
    """Pairs sorted by length, longest first, and their batches."""

    lengths: Integers
    """[pairs]: number of tokens of each pair's longer side, end token included"""
    order: Integers
    """[pairs]"""
    ends: Integers
    """[batches + 1]: batch i is `order[ends[i] : ends[i + 1]]`"""


@lru_cache(maxsize=4)
def layout(pairs: TokenPairs, batch_tokens: int) -> Layout:
    """Batches of as many pairs as fit into `batch_tokens` when padded to the longest, and at least one."""
    lengths = np.maximum(pairs.sources.lengths, pairs.targets.lengths) + 1
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order].tolist()
    ends = [0]
    while ends[-1] < len(falling):
        ends.append(ends[-1] + max(1, batch_tokens // falling[ends[-1]]))
    return Layout(lengths, order, np.minimum(ends, len(falling)))


@dataclass(frozen=True)
class ShuffledPairs:
    """Epochs of all `pairs` in batches of similar length, in random order.

    Rows × longest side, end token included, is at most `batch_tokens`, unless a single pair is longer. Each epoch
    has the same number of batches, with pairs of equal length and the order of batches reshuffled.
    Vaswani et al. 2017, section 5.1: "sentence pairs were batched together by approximate sequence length".
    """

    pairs: TokenPairs
    batch_tokens: int
    source_end: int
    target_end: int
    seed: int
    start: int | None = None

    @property
    def batches_per_epoch(self) -> int:
        return len(layout(self.pairs, self.batch_tokens).ends) - 1

    def batch(self, index: int) -> PairBatch:
        """Batch number `index`: a function of seed and index alone, so a run resumes, or skips, at any of them."""
        epoch, place = divmod(index, self.batches_per_epoch)
        order, batches = _epoch(self.pairs, self.batch_tokens, self.seed, epoch)
        start, end = layout(self.pairs, self.batch_tokens).ends[batches[place] :][:2]
        return batch_of(self.pairs, order[start:end], self.source_end, self.target_end, self.start)


@lru_cache(maxsize=2)
def _epoch(pairs: TokenPairs, batch_tokens: int, seed: int, epoch: int) -> tuple[Integers, Integers]:
    """The pairs by length, longest first, shuffled among equals, and the order of their batches."""
    lengths, _, ends = layout(pairs, batch_tokens)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    shuffled = generator.permutation(len(pairs))
    return shuffled[np.argsort(-lengths[shuffled], kind="stable")], generator.permutation(len(ends) - 1)


@dataclass(frozen=True)
class SequentialPairs(Batches):
    """All `pairs` once, longest first, in batches of at most `batch_tokens` as in ShuffledPairs."""

    pairs: TokenPairs
    batch_tokens: int
    source_end: int
    target_end: int
    start: int | None = None

    def __len__(self) -> int:
        """How many batches."""
        return len(layout(self.pairs, self.batch_tokens).ends) - 1

    def items(self, index: int) -> Integers:
        _, order, ends = layout(self.pairs, self.batch_tokens)
        return order[ends[index] : ends[index + 1]]

    def batch(self, index: int) -> PairBatch:
        """Batch number `index`, so that several processes can share the work."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return batch_of(self.pairs, self.items(index), self.source_end, self.target_end, self.start)
