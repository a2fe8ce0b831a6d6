"""Masks against loops over positions: True = may attend."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.architecture.masks import causal_mask, padding_mask, sliding_window_mask
from minitransformer.architecture.positions import token_positions

lengths = st.integers(1, 9)
some_positions = st.lists(st.integers(-1, 12), min_size=1, max_size=9)


@given(queries=some_positions, keys=some_positions)
def test_a_query_may_attend_to_no_later_position_and_to_all_others(queries: list[int], keys: list[int]) -> None:
    mask = causal_mask(torch.tensor([queries]), torch.tensor([keys]))
    assert mask.tolist() == [[[[key <= query for key in keys] for query in queries]]]


@given(queries=some_positions, keys=some_positions, window=lengths)
def test_a_window_reaches_as_far_back_as_ahead(queries: list[int], keys: list[int], window: int) -> None:
    mask = sliding_window_mask(torch.tensor([queries]), torch.tensor([keys]), window)
    assert mask.tolist() == [[[[-window < query - key < window for key in keys] for query in queries]]]


@given(length=lengths, window=lengths)
def test_a_causal_window_of_w_reaches_the_last_w_keys_itself_included(length: int, window: int) -> None:
    positions = token_positions(length)
    mask = causal_mask(positions, positions) & sliding_window_mask(positions, positions, window)
    for i in range(length):
        assert mask[0, 0, i].nonzero().flatten().tolist() == list(range(max(0, i - window + 1), i + 1))


@given(st.data(), lengths, lengths, st.integers(1, 3))
def test_masks_follow_positions_wherever_their_tokens_stand(
    data: st.DataObject, length: int, window: int, rows: int
) -> None:
    """Each row may hold its tokens in other slots: the mask has its columns there."""
    positions = token_positions(length)
    slots = torch.stack([torch.tensor(data.draw(st.permutations(range(length)))) for _ in range(rows)])
    for mask in (causal_mask, lambda queries, keys: sliding_window_mask(queries, keys, window)):
        whole = mask(positions, positions)
        assert torch.equal(mask(positions, slots), torch.stack([whole[0, :, :, row] for row in slots]))


def test_no_query_of_any_head_sees_padding() -> None:
    is_token = torch.tensor([[True, True, False], [False, True, True]])
    mask = padding_mask(is_token).expand(2, 4, 5, 3)
    for b in range(2):
        assert torch.equal(mask[b, 1, 3], is_token[b])
        assert torch.equal(mask[b, 3, 0], is_token[b])


def test_masks_combine_with_and_and_broadcast_over_batch_and_heads() -> None:
    is_token = torch.tensor([[True, True, True], [False, True, True]])
    mask = causal_mask(token_positions(3), token_positions(3)) & padding_mask(is_token)
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert mask[1, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]
