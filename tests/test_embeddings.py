"""Embeddings and heads, each against its equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.cache import tokens_as_slots
from minitransformer.architecture.embeddings import (
    ClassificationHead,
    LMHead,
    TokenEmbedding,
    TokenSmear,
    TransformedHead,
)
from minitransformer.architecture.norms import LayerNorm
from minitransformer.architecture.positions import token_positions

D, VOCABULARY = 8, 11
TOKENS = torch.tensor([[3, 1, 3], [0, 10, 2]])
SEGMENTS = torch.tensor([[0, 0, 1], [1, 0, 1]])


def rows_of(table: nn.Embedding, numbers: Tensor) -> Tensor:
    return torch.stack([torch.stack([table.weight[number] for number in row]) for row in numbers.tolist()])


def test_an_embedding_is_rows_of_its_table_times_its_scale(shake: Any) -> None:
    embedding = shake(TokenEmbedding(VOCABULARY, D, scale=D**0.5))
    torch.testing.assert_close(embedding(TOKENS), rows_of(embedding.table, TOKENS) * D**0.5)


def test_segments_are_added_after_the_scale_and_are_the_first_by_default(shake: Any) -> None:
    embedding = shake(TokenEmbedding(VOCABULARY, D, scale=3.0, num_segments=2))
    words = rows_of(embedding.table, TOKENS) * 3
    torch.testing.assert_close(embedding(TOKENS, SEGMENTS), words + rows_of(embedding.segments, SEGMENTS))
    torch.testing.assert_close(embedding(TOKENS), words + embedding.segments.weight[0])


def smeared(smear: TokenSmear, x: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
    return smear(x, tokens_as_slots(token_positions(x.size(1), is_token), is_token))


def test_a_smear_adds_the_embedding_before_by_its_gains_and_begins_without(shake: Any) -> None:
    x, smear = torch.randn(2, 4, D), TokenSmear(D)
    torch.testing.assert_close(smeared(smear, x), x)
    shake(smear)
    torch.testing.assert_close(smeared(smear, x)[:, 0], x[:, 0])
    for t in range(1, 4):
        torch.testing.assert_close(smeared(smear, x)[:, t], x[:, t] + smear.gain * x[:, t - 1])


def test_padding_is_not_smeared(shake: Any) -> None:
    x, smear = torch.randn(1, 3, D), shake(TokenSmear(D))
    padded = torch.cat([torch.randn(1, 2, D), x], dim=1)
    is_token = torch.tensor([[False, False, True, True, True]])
    torch.testing.assert_close(smeared(smear, padded, is_token)[:, 2:], smeared(smear, x))


def test_a_narrow_table_is_brought_to_d_model_by_a_linear_map(shake: Any) -> None:
    embedding = shake(TokenEmbedding(VOCABULARY, D, embedding_dim=3))
    assert embedding.table.weight.shape == (VOCABULARY, 3)
    torch.testing.assert_close(embedding(TOKENS), rows_of(embedding.table, TOKENS) @ embedding.project.weight.T)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_is_scaled_multiplied_and_capped(bias: bool, shake: Any) -> None:
    head, x = shake(LMHead(D, VOCABULARY, bias=bias, scale=0.5, softcap=2.0)), torch.randn(2, 3, D)
    logits = 0.5 * x @ head.weight.T + (head.bias if bias else 0)
    torch.testing.assert_close(head(x), 2 * torch.tanh(logits / 2))
    assert head(1000 * x).abs().max() <= 2


def test_a_tied_head_multiplies_by_the_table_of_the_embedding(shake: Any) -> None:
    embedding, x = shake(TokenEmbedding(VOCABULARY, D)), torch.randn(2, 3, D)
    head = LMHead(D, VOCABULARY, tied_to=embedding)
    assert head.weight is embedding.table.weight
    torch.testing.assert_close(head(x), x @ embedding.table.weight.T)


def test_a_transformed_head_is_a_linear_map_its_activation_a_norm_and_a_head(shake: Any) -> None:
    norm = LayerNorm.choose().make(D)
    head = shake(TransformedHead(D, LMHead(D, VOCABULARY, bias=True), activation=F.gelu, norm=norm))
    x = torch.randn(2, 3, D)
    transformed = norm(F.gelu(x @ head.transform.weight.T + head.transform.bias))
    torch.testing.assert_close(head(x), transformed @ head.head.weight.T + head.head.bias)


@pytest.mark.parametrize(("pooling", "activation"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_classes_come_from_the_first_token_alone(pooling: str, activation: Any, shake: Any) -> None:
    head, x = shake(ClassificationHead(D, 5, pooling=pooling)), torch.randn(2, 3, D)
    pooled = activation(x[:, 0] @ head.pool.weight.T + head.pool.bias)
    torch.testing.assert_close(head(x), pooled @ head.classify.weight.T + head.classify.bias)


@given(left=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_the_first_token_is_the_first_that_is_not_padding(left: list[int], shake: Any) -> None:
    head, x = shake(ClassificationHead(D, 5)), torch.randn(len(left), 4, D)
    is_token = torch.arange(4) >= torch.tensor(left)[:, None]
    expected = torch.cat([head(x[[row], padding:]) for row, padding in enumerate(left)])
    torch.testing.assert_close(head(x, is_token), expected)
