"""Random texts, and one text in every way that a law speaks of, as the rows of one batch: a few calls see them all."""

from __future__ import annotations

import torch
from torch import Tensor


def with_another_end(tokens: Tensor, vocab_size: int) -> Tensor:
    """Row i of the result differs from the one text in `tokens` from place i + 1 on, in every place."""
    rows = tokens.repeat(tokens.size(1) - 1, 1)
    return torch.where(torch.ones_like(rows).triu(1).bool(), (rows + 1) % vocab_size, rows)


def with_padding(tokens: Tensor, padding: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The one text in `tokens` amid padding, which may hold anything, and where it is: in row i from place i on."""
    wide = torch.randint(0, vocab_size, (padding + 1, tokens.size(1) + padding))
    is_token = torch.zeros_like(wide).bool()
    for left in range(padding + 1):
        is_token[left, left : left + tokens.size(1)] = True
    wide[is_token] = tokens.repeat(padding + 1, 1).flatten()
    return wide, is_token


def without_padding(values: Tensor, is_token: Tensor) -> Tensor:
    """What a model says of the text in each row of `with_padding`, [padding + 1, length, ...]."""
    return values[is_token].unflatten(0, (len(values), -1))


def texts(rows: int = 1, length: int = 6) -> Tensor:
    """Random tokens of a vocabulary of 11."""
    return torch.randint(0, 11, (rows, length))


def close(actual: Tensor, expected: Tensor) -> None:
    """That float64 values differ by rounding alone."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
