"""Batches: windows of the tokens, the target of each position being the next token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.text.batches import IGNORE, Batch, SequentialWindows, ShuffledWindows

sizes = st.integers(1, 9)


def tokens(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint16)


@given(count=st.integers(2, 60), length=sizes, rows=sizes, seed=st.integers(0, 2**32), index=st.integers(0, 2**40))
def test_shuffled_windows_are_consecutive_tokens_and_their_successors(
    count: int, length: int, rows: int, seed: int, index: int
) -> None:
    length = min(length, count - 1)
    batch = ShuffledWindows(tokens(count), length, rows, seed).batch(index)
    assert batch.inputs.shape == batch.targets.shape == (rows, length)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert torch.equal(batch.inputs, batch.inputs[:, :1] + torch.arange(length))


@given(seed=st.integers(0, 2**32), index=st.integers(0, 2**40))
def test_a_shuffled_batch_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    windows = ShuffledWindows(tokens(5000), 8, 4, seed)
    windows.batch(index + 1)
    np.random.seed(0)
    first, again = windows.batch(index), ShuffledWindows(tokens(5000), 8, 4, seed).batch(index)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, windows.batch(index + 1).inputs)
    assert not torch.equal(first.inputs, ShuffledWindows(tokens(5000), 8, 4, seed + 1).batch(index).inputs)


@given(count=st.integers(3, 200), length=sizes, rows=sizes, epoch=st.integers(0, 2**40))
def test_an_epoch_has_every_token_at_most_once_and_nearly_all_of_them(
    count: int, length: int, rows: int, epoch: int
) -> None:
    length = min(length, count - 1)
    per_epoch = ShuffledWindows(tokens(count), length, 1, seed=3).windows_per_epoch
    whole = ShuffledWindows(tokens(count), length, per_epoch, seed=3).batch(epoch).inputs.flatten().tolist()
    assert len(set(whole)) == len(whole)
    assert len(whole) > count - 1 - 2 * length or per_epoch == 1
    # However the windows are divided into batches, they come in the same order.
    first = ShuffledWindows(tokens(count), length, rows, seed=3).batch(0).inputs
    again = torch.cat([ShuffledWindows(tokens(count), length, 1, seed=3).batch(i).inputs for i in range(rows)])
    assert torch.equal(first, again)


def test_epochs_begin_everywhere() -> None:
    windows = ShuffledWindows(tokens(10), 4, 1, seed=0)
    assert {int(windows.batch(i).inputs[0, 0]) for i in range(200)} == set(range(6))


def test_too_few_tokens_for_a_window_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match="8 tokens are too few for a window of 9"):
        ShuffledWindows(tokens(8), 8, 1, seed=0)


@given(count=st.integers(0, 200), length=sizes, rows=sizes)
def test_sequential_windows_predict_every_token_but_the_first_once_in_order(count: int, length: int, rows: int) -> None:
    windows = SequentialWindows(tokens(count), length, rows)
    batches = list(windows)
    predicted = [target for batch in batches for target in batch.targets.flatten().tolist() if target != IGNORE]
    assert predicted == list(range(1, count))
    assert len(batches) == len(windows)
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape
        assert batch.inputs.shape[0] <= rows
        assert batch.inputs.shape[1] <= length
        real = batch.targets != IGNORE
        assert torch.equal(batch.inputs[real] + 1, batch.targets[real])


@given(count=st.integers(0, 200), length=sizes, rows=sizes, data=st.data())
def test_overlapping_windows_predict_every_token_once_from_at_least_their_overlap(
    count: int, length: int, rows: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    batches = list(SequentialWindows(tokens(count), length, rows, stride))
    predicted = [target for batch in batches for target in batch.targets.flatten().tolist() if target != IGNORE]
    assert predicted == list(range(1, count))
    for batch in batches:
        real = batch.targets != IGNORE
        assert torch.equal(batch.inputs[real] + 1, batch.targets[real])
        before = batch.targets - batch.inputs[:, :1]
        assert (before[real] >= batch.targets[real].clamp(max=length - stride + 1)).all()
    assert [len(batch.inputs) for batch in batches[:-1]] == [rows] * (len(batches) - 1)


def test_ignore_is_what_cross_entropy_ignores() -> None:
    import inspect

    assert inspect.signature(torch.nn.functional.cross_entropy).parameters["ignore_index"].default == IGNORE


@given(rows=sizes, size=sizes)
def test_micro_batches_join_to_the_batch(rows: int, size: int) -> None:
    batch = ShuffledWindows(tokens(50), 5, rows, seed=0).batch(0)
    parts = batch.split(size)
    assert all(len(part.inputs) <= size for part in parts)
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)


def test_a_batch_moves_whole() -> None:
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)).to("meta")
    assert batch.inputs.is_meta
    assert batch.targets.is_meta
