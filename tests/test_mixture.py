"""The order of a mixture of shards: laws of shares, of epochs, and of what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import StorageError
from minitransformer.text.batches import windows_in
from minitransformer.text.mixed_batches import MixedWindows
from minitransformer.text.mixture import MOST_WEIGHT, Mixture, permuted, whole_weights
from minitransformer.text.token_files import JoinedTokens, TokenFile

pytestmark = pytest.mark.unchecked_shapes

weights = st.lists(st.one_of(st.integers(1, 10**12).map(float), st.floats(1e-3, 1e6)), min_size=1, max_size=40)
positions = st.lists(st.integers(0, 2**50), min_size=1, max_size=20)


@given(weights=weights)
def test_whole_weights_have_the_ratios_of_the_weights(weights: list[float]) -> None:
    whole = np.array(whole_weights(weights))
    assert whole.min() >= 1
    assert whole.sum() < MOST_WEIGHT
    assert whole / whole.sum() == pytest.approx(np.array(weights) / sum(weights), abs=3e-8)


def test_decimal_weights_are_exact() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([300, 100.0]) == [3, 1]


@given(weights=weights, rows=st.integers(0, 2000))
def test_in_every_beginning_each_shard_has_its_share_within_rounding(weights: list[float], rows: int) -> None:
    whole = whole_weights(weights)
    shards, before = Mixture(tuple(whole)).places(np.arange(rows))
    counts = np.cumsum(shards[:, None] == np.arange(len(whole)), axis=0)
    shares = np.arange(1, rows + 1)[:, None] * np.array(whole) / sum(whole)
    assert np.abs(counts - shares).max(initial=0) <= (len(whole) - 1).bit_length() / 2 + 1e-6
    # Of each row it is known how many rows of its shard come before, without having seen them.
    assert np.array_equal(before, counts[np.arange(rows), shards] - 1)


@given(weights=weights, rows=positions)
def test_the_shard_of_a_row_depends_on_the_row_alone_however_late(weights: list[float], rows: list[int]) -> None:
    mixture = Mixture(tuple(whole_weights(weights)))
    shards, before = mixture.places(np.array(rows))
    for row, shard, place in zip(rows, shards, before, strict=True):
        assert mixture.places(np.array([row])) == (shard, place)
        share = mixture.weights[shard] / sum(mixture.weights)
        assert place == pytest.approx(row * share, abs=4, rel=1e-9)


def order_of(count: int, seed: int) -> np.ndarray:
    keys = np.random.SeedSequence(seed).generate_state(6, np.uint64)
    return permuted(np.arange(count), np.full(count, count), np.tile(keys, (count, 1)))


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_the_order_of_windows_is_a_permutation(count: int, seed: int) -> None:
    order = order_of(count, seed)
    assert sorted(order) == list(range(count))
    assert count < 50 or (np.diff(order) == 1).mean() < 0.2


def test_orders_are_shuffled_evenly() -> None:
    first = np.bincount([order_of(10, seed)[0] for seed in range(2000)], minlength=10)
    assert (np.abs(first - 200) < 5 * np.sqrt(200)).all(), first


def mixed(sizes: list[int], weights: list[int], length: int, rows: int = 4, seed: int = 0) -> MixedWindows:
    """Shards of consecutive tokens, so that a token says where it stands."""
    starts = np.cumsum([0, *sizes])
    shards = [np.arange(start, start + count) for start, count in zip(starts, sizes, strict=False)]
    return MixedWindows(shards, tuple(weights), length, rows, seed)


@given(
    shards=st.lists(st.tuples(st.integers(10, 60), st.integers(1, 9)), min_size=1, max_size=5),
    length=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_a_shard_has_each_window_once_an_epoch_of_its_own(
    shards: list[tuple[int, int]], length: int, seed: int
) -> None:
    sizes, weights = map(list, zip(*shards, strict=True))
    windows = mixed(sizes, weights, length, seed=seed)
    numbers = np.arange(300)
    which, _ = Mixture(tuple(weights)).places(numbers)
    found = windows.windows(numbers)
    assert np.array_equal(found, found[:, :1] + np.arange(length + 1))
    for shard, (size, start) in enumerate(zip(sizes, np.cumsum([0, *sizes]), strict=False)):
        starts = found[which == shard, 0] - start
        assert (starts >= 0).all()
        assert (starts + length < size).all()
        per_epoch = windows_in(size, length)
        for epoch in range(len(starts) // per_epoch):
            seen = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
            assert np.array_equal(np.diff(seen), np.full(per_epoch - 1, length))


def test_epochs_begin_everywhere_and_have_orders_of_their_own() -> None:
    starts = mixed([34], [1], 4).windows(np.arange(7 * 200))[:, 0].reshape(200, 7)
    assert {int(start) % 4 for start in starts[:, 0]} == {0, 1, 2, 3}
    assert len({tuple(np.argsort(epoch)) for epoch in starts}) > 190


@given(numbers=positions, seed=st.integers(0, 2**32))
def test_a_window_depends_on_seed_and_number_alone(numbers: list[int], seed: int) -> None:
    windows, again = (mixed([500, 90, 333], [5, 1, 2], 8, seed=seed) for _ in range(2))
    whole = windows.windows(np.array(numbers))
    assert np.array_equal(whole, np.concatenate([again.windows(np.array([number])) for number in numbers]))
    assert not np.array_equal(
        windows.windows(np.arange(20)), mixed([500, 90, 333], [5, 1, 2], 8, seed=seed + 1).windows(np.arange(20))
    )


@given(rows=st.integers(1, 12), index=st.integers(0, 2**30), size=st.integers(1, 5), ranks=st.integers(1, 5))
def test_ranks_and_micro_batches_read_their_rows_of_the_one_batch(rows: int, index: int, size: int, ranks: int) -> None:
    windows = mixed([500, 90, 333], [5, 1, 2], 8, rows=rows)
    batch = windows.batch(index)
    assert torch.equal(torch.cat([part.inputs for part in batch.split(size)]), batch.inputs)
    parts = [batch.rows(rank * rows // ranks, (rank + 1) * rows // ranks) for rank in range(ranks)]
    assert sum(part.num_targets for part in parts) == batch.num_targets == rows * 8
    assert torch.equal(torch.cat([part.inputs for part in parts if part.num_targets]), batch.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts if part.num_targets]), batch.targets)


def test_a_rank_reads_no_row_of_another() -> None:
    read: list[int] = []

    class Counted(MixedWindows):
        def windows(self, numbers: np.ndarray) -> np.ndarray:
            read.extend(numbers.tolist())
            return super().windows(numbers)

    batch = Counted([np.arange(100)], (1,), 4, batch_size=8, seed=0).batch(3)
    assert (batch.num_rows, batch.num_targets, batch.num_tokens) == (8, 32, 32)
    assert read == []
    batch.split(4)[1].rows(1, 3)
    assert read == [3 * 8 + 5, 3 * 8 + 6]
    assert batch.rows(2, 2).num_targets == 0
    assert len(read) == 2


@given(sizes=st.lists(st.integers(0, 20), max_size=6), first=st.integers(-3, 130), last=st.integers(-3, 130))
def test_joined_files_are_read_as_one_array(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], first: int, last: int
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    whole = np.arange(sum(sizes), dtype="<u2")
    parts = []
    for number, part in enumerate(np.split(whole, np.cumsum(sizes)[:-1]) if sizes else []):
        part.tofile(folder / f"{number}.bin")
        parts.append(TokenFile.open(folder / f"{number}.bin", whole.dtype))
    joined = JoinedTokens(tuple(parts))
    assert len(joined) == len(whole)
    assert np.array_equal(joined[first:last], whole[first:last])
    low, high = sorted((max(first, 0), min(max(last, 0), len(whole))))
    assert np.array_equal(joined.part(low, high)[:], whole[low:high])
    if len(whole) > 4:
        places = np.array([[0, 1, 2], [3, 1, 2]])
        assert np.array_equal(joined[places], whole[places])


def test_a_file_that_changes_while_it_is_in_use_is_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.arange(10, dtype="<u2").tofile(path)
    tokens = TokenFile.open(path, np.dtype("<u2")).part(2, 8)
    assert tokens[1:3].tolist() == [3, 4]
    np.arange(9, dtype="<u2").tofile(path)
    with pytest.raises(StorageError, match=r"a\.bin has changed while it was in use"):
        tokens[1:3]
    path.unlink()
    with pytest.raises(StorageError, match=r"a\.bin cannot be read \(No such file"):
        tokens[1:3]
    path.write_bytes(b"123")
    with pytest.raises(StorageError, match="3 bytes, not a multiple of the 2"):
        TokenFile.open(path, np.dtype("<u2"))
