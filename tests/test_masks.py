"""Masks against loops over positions: True = may attend, and the last query stands at the last key."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.architecture.masks import causal_mask, padding_mask, sliding_window_mask

lengths = st.integers(1, 9)


@given(queries=lengths, keys=lengths)
def test_a_query_sees_no_later_key_and_the_last_query_sees_all(queries: int, keys: int) -> None:
    mask = causal_mask(queries, keys)
    assert mask.shape == (1, 1, queries, keys)
    for i in range(queries):
        for j in range(keys):
            assert mask[0, 0, i, j] == (j <= i + keys - queries)
    assert mask[0, 0, -1].all()


@given(queries=lengths, keys=lengths, window=lengths)
def test_a_window_reaches_as_far_back_as_ahead(queries: int, keys: int, window: int) -> None:
    mask = sliding_window_mask(queries, keys, window)
    for i in range(queries):
        for j in range(keys):
            assert mask[0, 0, i, j] == (-window < i + keys - queries - j < window)


@given(length=lengths, window=lengths)
def test_a_causal_window_of_w_sees_the_last_w_keys_itself_included(length: int, window: int) -> None:
    mask = causal_mask(length, length) & sliding_window_mask(length, length, window)
    for i in range(length):
        assert mask[0, 0, i].nonzero().flatten().tolist() == list(range(max(0, i - window + 1), i + 1))


@given(queries=lengths, keys=lengths, extra=lengths)
def test_the_masks_of_the_newest_queries_are_the_last_rows_of_the_whole(queries: int, keys: int, extra: int) -> None:
    total = queries + extra
    assert torch.equal(causal_mask(queries, total), causal_mask(total, total)[:, :, extra:])
    whole = sliding_window_mask(total, total, keys)
    assert torch.equal(sliding_window_mask(queries, total, keys), whole[:, :, extra:])


def test_no_query_of_any_head_sees_padding() -> None:
    is_token = torch.tensor([[True, True, False], [False, True, True]])
    mask = padding_mask(is_token).expand(2, 4, 5, 3)
    for b in range(2):
        assert torch.equal(mask[b, 1, 3], is_token[b])
        assert torch.equal(mask[b, 3, 0], is_token[b])


def test_masks_combine_with_and_and_broadcast_over_batch_and_heads() -> None:
    is_token = torch.tensor([[True, True, True], [False, True, True]])
    mask = causal_mask(3, 3) & padding_mask(is_token)
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert mask[1, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]
