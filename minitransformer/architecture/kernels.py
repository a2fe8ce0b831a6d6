"""Fast attention kernels, equivalent to `scaled_dot_product_attention`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minitransformer.architecture.attention import (
    AttentionKernel,
    allowed_keys,
    check_heads,
    every_query_has_a_key,
    scaled_dot_product_attention,
)

QUERIES_AT_ONCE = 128
"""block sizes of `blockwise_attention`: smaller ones skip more keys, in slower products (measured)"""


def blockwise_attention(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "... #query #key"] | None = None,
    bias: Float[Tensor, "... #query #key"] | None = None,
    **options: Any,
) -> Float[Tensor, "batch heads query value_dim"]:
    """`scaled_dot_product_attention` by blocks of queries, without the keys after each block.

    For many queries with `causal`, this takes little more than half of the work.
    """
    queries, keys = q.size(-2), k.size(-2)
    if not causal or queries == 1 or queries > keys:
        return scaled_dot_product_attention(q, k, v, causal=causal, mask=mask, bias=bias, **options)
    attended = []
    for first in range(0, queries, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, queries)
        visible = keys - queries + last
        part = partial(_part, first=first, last=last, visible=visible)
        attended.append(
            scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, :, :visible],
                v[:, :, :visible],
                causal=True,
                mask=part(mask),
                bias=part(bias),
                **options,
            )
        )
    return torch.cat(attended, dim=-2)


def _part(limits: Tensor | None, first: int, last: int, visible: int) -> Tensor | None:
    """The part of a mask or bias for a block of queries and keys; dimensions of size 1 broadcast."""
    if limits is None:
        return None
    limits = limits[..., :visible]
    return limits[..., first:last, :] if limits.dim() > 1 and limits.size(-2) > 1 else limits


def fused_attention(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "... #query #key"] | None = None,
    bias: Float[Tensor, "... #query #key"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads query value_dim"]:
    """`scaled_dot_product_attention` by torch's fused kernels, which lack `softcap`: that is computed by hand."""
    if softcap is not None:
        return scaled_dot_product_attention(
            q, k, v, causal=causal, mask=mask, bias=bias, scale=scale, softcap=softcap, dropout=dropout
        )
    if q.size(-2) == 1:
        causal = False  # a single query at the last position attends to all keys
    # torch aligns `is_causal` with the first key, which is right only for as many queries as keys.
    is_causal = causal and mask is None and bias is None and q.size(-2) == k.size(-2)
    attn_mask = None if is_causal else _mask_or_bias(q, k, causal, mask, bias)
    grouped = {}
    if q.size(1) != k.size(1):
        check_heads(q.size(1), k.size(1))
        grouped = {"enable_gqa": True}
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale, **grouped
    )
    # torch's kernels for CPUs give zeros themselves.
    if q.device.type == "cpu" or every_query_has_a_key(q, k, causal, mask):
        return attended
    has_a_key = allowed_keys(q, k, causal, mask).any(-1, keepdim=True)  # type: ignore[union-attr]
    return attended.masked_fill(~has_a_key, 0.0)


def _mask_or_bias(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Mask, causality and bias combined as torch's `attn_mask`, of at least two dimensions."""
    allowed = allowed_keys(q, k, causal, mask)
    if bias is not None:
        bias = bias.to(q.dtype)
        allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    return allowed if allowed is None or allowed.dim() > 1 else allowed[None]


def fastest_attention(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    *,
    dropout: float = 0.0,
    **options: Any,
) -> Float[Tensor, "batch heads query value_dim"]:
    """The fastest kernel for these tensors, by a fixed rule, so that a resumed run continues exactly."""
    # Measured: torch's fused CPU kernel is five times slower than by hand in bfloat16, has no dropout, and is
    # slower to train with few keys.
    few_to_train = torch.is_grad_enabled() and k.size(-2) <= QUERIES_AT_ONCE
    by_hand = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or dropout > 0 or few_to_train)
    kernel = blockwise_attention if by_hand else fused_attention
    return kernel(q, k, v, dropout=dropout, **options)


KERNELS: dict[str, AttentionKernel] = {
    "auto": fastest_attention,
    "by-hand": scaled_dot_product_attention,
    "blockwise": blockwise_attention,
    "fused": fused_attention,
}
