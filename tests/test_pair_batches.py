"""Batches of pairs: every pair once an epoch, among others of its length, within the budget of tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.text.batches import IGNORE
from minitransformer.text.pair_batches import PairBatch, SequentialPairs, ShuffledPairs
from minitransformer.text.token_files import Ragged, TokenPairs

SOURCE_END, TARGET_END = 1000, 2000
TextPair = tuple[list[int], list[int]]
# Ids may be 0 and ends may be long: neither must be taken for padding.
texts = st.lists(st.integers(0, 9), max_size=12)
some_pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=40)
budgets = st.integers(1, 60)
seeds = st.integers(0, 2**32)


def token_pairs(pairs: list[TextPair]) -> TokenPairs:
    sources, targets = zip(*pairs, strict=True)
    kind = np.dtype("<u2")
    return TokenPairs(*(Ragged.join(map(np.array, side), kind) for side in (sources, targets)))


def shuffled(pairs: list[TextPair] | TokenPairs, batch_tokens: int, seed: int = 0) -> ShuffledPairs:
    content = pairs if isinstance(pairs, TokenPairs) else token_pairs(pairs)
    return ShuffledPairs(content, batch_tokens, SOURCE_END, TARGET_END, seed)


def sequential(pairs: list[TextPair], batch_tokens: int) -> SequentialPairs:
    return SequentialPairs(token_pairs(pairs), batch_tokens, SOURCE_END, TARGET_END)


def held(batch: PairBatch) -> list[TextPair]:
    """The pairs of a batch, read row by row."""
    pairs = []
    for source, is_token, targets in zip(batch.source, batch.source_is_token, batch.targets, strict=True):
        *first, source_end = source[is_token].tolist()
        *second, target_end = targets[targets != IGNORE].tolist()
        assert (source_end, target_end) == (SOURCE_END, TARGET_END)
        pairs.append((first, second))
    return pairs


def epoch(batches: ShuffledPairs, number: int) -> list[PairBatch]:
    count = batches.batches_per_epoch
    return [batches.batch(number * count + i) for i in range(count)]


@given(pairs=some_pairs, budget=budgets, seed=seeds, number=st.integers(0, 2**40))
def test_every_pair_comes_once_an_epoch(pairs: list[TextPair], budget: int, seed: int, number: int) -> None:
    seen = [pair for batch in epoch(shuffled(pairs, budget, seed), number) for pair in held(batch)]
    assert sorted(seen) == sorted(pairs)


@given(pairs=some_pairs, budget=budgets)
def test_every_pair_comes_once_in_sequence_longest_first(pairs: list[TextPair], budget: int) -> None:
    batches = sequential(pairs, budget)
    seen = [pair for batch in batches for pair in held(batch)]
    assert sorted(seen) == sorted(pairs)
    assert all(max(map(len, before)) >= max(map(len, after)) for before, after in pairwise(seen))
    assert len(list(batches)) == len(batches)
    with pytest.raises(IndexError, match=f"batch {len(batches)} of {len(batches)}"):
        batches.batch(len(batches))


@given(pairs=some_pairs, budget=budgets, index=st.integers(0, 2**40))
def test_no_batch_exceeds_the_budget_but_a_single_pair(pairs: list[TextPair], budget: int, index: int) -> None:
    for batch in [shuffled(pairs, budget).batch(index), *sequential(pairs, budget)]:
        rows = len(batch.source)
        assert rows * max(batch.source.shape[1], batch.targets.shape[1]) <= budget or rows == 1


@given(pairs=some_pairs, budget=budgets, seed=seeds, index=st.integers(0, 2**40))
def test_a_batch_depends_on_seed_and_index_alone(pairs: list[TextPair], budget: int, seed: int, index: int) -> None:
    batches = shuffled(pairs, budget, seed)
    batches.batch(index + 7)
    np.random.seed(0)
    first, again = batches.batch(index), shuffled(pairs, budget, seed).batch(index)
    assert torch.equal(first.source, again.source)
    assert torch.equal(first.targets, again.targets)


@given(pairs=some_pairs, budget=budgets)
def test_inputs_begin_with_the_start_token_and_are_one_behind_the_targets(pairs: list[TextPair], budget: int) -> None:
    for batch in sequential(pairs, budget):
        assert (batch.inputs[:, 0] == TARGET_END).all()
        followed = batch.targets[:, 1:] != IGNORE
        assert torch.equal(batch.inputs[:, 1:][followed], batch.targets[:, :-1][followed])
        # Padding is ids that an embedding has, behind all tokens, and no wider than it must be.
        assert not batch.source[~batch.source_is_token].any()
        assert not batch.inputs[:, 1:][~followed].any()
        for real in (batch.source_is_token, batch.targets != IGNORE):
            assert (real[:, :-1] >= real[:, 1:]).all()
            assert real.any(0).all()
        assert all(tensor.is_contiguous() for tensor in (batch.source, batch.inputs, batch.targets))
        assert batch.num_tokens == sum(len(first) + len(second) + 2 for first, second in held(batch))
        assert batch.num_targets == sum(len(second) + 1 for _, second in held(batch))


def test_similar_lengths_come_together_so_that_little_is_padding() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, 5000)
    batches = shuffled([([1] * size, [1] * size) for size in lengths.tolist()], 2000)
    real = padded = 0
    for batch in epoch(batches, 0):
        real += batch.num_tokens
        padded += batch.source.numel() + batch.targets.numel()
    assert real / padded > 0.95


def test_epochs_and_seeds_differ_in_the_order_of_batches_and_in_who_meets_whom() -> None:
    pairs = [([i % 10, i // 10], [0]) for i in range(100)]

    def companies(batches: list[PairBatch]) -> list[list[TextPair]]:
        return [sorted(held(batch)) for batch in batches]

    batches = shuffled(pairs, 12)
    first, second = companies(epoch(batches, 0)), companies(epoch(batches, 1))
    assert len(first) == len(second) == 25
    assert sorted(first) != sorted(second)
    assert companies(epoch(shuffled(pairs, 12, seed=1), 0)) != first
    rising = shuffled([([0] * size, [0]) for size in range(1, 40)], 1)
    assert [batch.source.shape[1] for batch in epoch(rising, 0)] != [
        batch.source.shape[1] for batch in epoch(rising, 1)
    ]


def test_a_batch_splits_into_micro_batches_and_moves_whole() -> None:
    (batch,) = sequential([([i], [i, i]) for i in range(5)], 100)
    parts = [part.to("cpu", non_blocking=True) for part in batch.split(2)]
    assert [len(part.source) for part in parts] == [2, 2, 1]
    assert sum(part.num_tokens for part in parts) == batch.num_tokens
    assert [pair for part in parts for pair in held(part)] == held(batch)
    assert batch.to("meta").source_is_token.device.type == "meta"
