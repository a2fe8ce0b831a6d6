"""Pooling: one vector of a sequence, whatever padding is beside it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from minitransformer.architecture.pooling import POOLINGS

BY_HAND = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1]}


def test_every_pooling_is_stated_a_second_time() -> None:
    assert POOLINGS.keys() == BY_HAND.keys()


@pytest.mark.parametrize("name", POOLINGS)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), offset=st.integers(0, 3))
def test_what_is_pooled_is_the_tokens_alone(name: str, lengths: list[int], offset: int) -> None:
    texts = [torch.randn(length, 5, dtype=torch.float64) for length in lengths]
    x = torch.full((len(texts), offset + max(lengths) + 2, 5), 1e6, dtype=torch.float64)
    is_token = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, text in enumerate(texts):
        place = slice(offset, offset + len(text))
        x[row, place], is_token[row, place] = text, True
    expected: list[Tensor] = [BY_HAND[name](text) for text in texts]
    torch.testing.assert_close(POOLINGS[name](x, is_token), torch.stack(expected))
