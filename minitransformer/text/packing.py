"""Conversations packed into rows of one length: shuffled for training, in order for evaluation."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from minitransformer.text.batches import IGNORE, Batches, TrainingBatch
from minitransformer.text.pair_batches import Integers
from minitransformer.text.token_files import TokenPairs


@dataclass(frozen=True)
class PackedBatch(TrainingBatch):
    """Rows of conversations: their ids, for each position the next one or IGNORE outside answers, and whose it is.

    `documents` counts the conversations of a row from 1, and is 0 at padding, which is at its end.
    """

    inputs: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]
    documents: Int64[Tensor, "batch length"]

    @property
    def item_tokens(self) -> Tensor:
        """[conversations] tokens of each."""
        return torch.bincount(self.item_numbers[self.documents > 0])

    @property
    def item_numbers(self) -> Tensor:
        """[batch, length] the number of each conversation in the batch; that of another one at padding."""
        count = self.documents.max(1).values
        return self.documents + (count.cumsum(0) - count)[:, None] - 1


def packed_rows(lengths: Integers, room: int) -> list[list[int]]:
    """Rows of the numbers of texts with these `lengths`, of at most `room` tokens each, by best fit decreasing.

    The longest text first, each goes to the fullest row that has room for it. Ding et al. 2024 (arXiv 2404.10830),
    section 3.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by their room, and the rooms that there are
    rooms: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            left = rooms[place]
            row = with_room[left].pop()
            if not with_room[left]:
                del rooms[place]
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        left -= length
        if left > 0:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return rows


@lru_cache(maxsize=4)
def row_layout(pairs: TokenPairs, length: int, packing: bool) -> list[list[int]]:
    """The rows of all conversations: several in each, or one."""
    read = pairs.sources.lengths - 1
    return packed_rows(read, length) if packing else [[number] for number in range(len(read))]


@dataclass(frozen=True)
class PackedConversations(Batches):
    """Rows of `length` tokens, `rows` a batch: all of them in order, or epochs of them in random order.

    Each epoch has the same rows but for conversations of equal length, which change places at random.
    """

    pairs: TokenPairs
    length: int
    rows: int
    packing: bool

    def __len__(self) -> int:
        """Number of batches that hold everything once."""
        return -(-len(row_layout(self.pairs, self.length, self.packing)) // self.rows)

    def batch(self, index: int) -> PackedBatch:
        """Batch number `index` of those in order; the last may have fewer rows."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = row_layout(self.pairs, self.length, self.packing)[index * self.rows : (index + 1) * self.rows]
        return self._of(rows)

    def items(self, index: int) -> Integers:
        rows = row_layout(self.pairs, self.length, self.packing)[index * self.rows : (index + 1) * self.rows]
        return np.array([text for row in rows for text in row], np.int64)

    def shuffled(self, seed: int, index: int) -> PackedBatch:
        """Training batch number `index`: a function of seed and index alone, so that a run resumes at any of them."""
        rows, chosen = row_layout(self.pairs, self.length, self.packing), []
        for number in range(index * self.rows, (index + 1) * self.rows):
            epoch, place = divmod(number, len(rows))
            order, stand_ins = _epoch(self.pairs, len(rows), seed, epoch)
            chosen.append([int(stand_ins[text]) for text in rows[order[place]]])
        return self._of(chosen)

    def _of(self, rows: list[list[int]]) -> PackedBatch:
        inputs, documents = np.zeros((2, len(rows), self.length), np.int64)
        targets = np.full_like(inputs, IGNORE)
        for row, texts in enumerate(rows):
            end = 0
            for count, text in enumerate(texts, start=1):
                ids, is_answer = self.pairs.sources[text].astype(np.int64), self.pairs.targets[text]
                begin, end = end, end + len(ids) - 1
                inputs[row, begin:end], documents[row, begin:end] = ids[:-1], count
                targets[row, begin:end] = np.where(is_answer[1:] == 1, ids[1:], IGNORE)
        return PackedBatch(*map(torch.from_numpy, (inputs, targets, documents)))


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch(pairs: TokenPairs, rows: int, seed: int, epoch: int) -> tuple[Integers, Integers]:
    """The order of an epoch's rows, and in place of each conversation one of the same length."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    lengths, shuffled = pairs.sources.lengths, generator.permutation(len(pairs))
    stand_ins = np.empty(len(pairs), np.int64)
    stand_ins[np.argsort(lengths, kind="stable")] = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    return generator.permutation(rows), stand_ins
