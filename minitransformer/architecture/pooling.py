"""Pooling: from the hidden states of a sequence to one vector.

Reimers and Gurevych 2019 (Sentence-BERT, arXiv 1908.10084), section 3; last token: Neelakantan et al. 2022
(arXiv 2201.10005), section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mean_of_tokens(
    x: Float[Tensor, "batch length features"], is_token: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch features"]:
    """The mean over the tokens of each row; `is_token` is False at padding."""
    return (x * is_token[..., None]).sum(1) / is_token.sum(1, keepdim=True)


def first_token(
    x: Float[Tensor, "batch length features"], is_token: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch features"]:
    """The first token of each row, before which there may be padding."""
    return x[torch.arange(len(x), device=x.device), is_token.long().argmax(1)]


def last_token(
    x: Float[Tensor, "batch length features"], is_token: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch features"]:
    """The last token of each row, after which there may be padding."""
    return first_token(x.flip(1), is_token.flip(1))


Pooling = Callable[[Tensor, Tensor], Tensor]
"""From hidden states [batch, length, features] and where they are tokens [batch, length] to [batch, features]"""
POOLINGS: dict[str, Pooling] = {"mean": mean_of_tokens, "first": first_token, "last": last_token}
