"""Boolean masks, True = may attend, shaped to broadcast over [batch, heads, query, key]; combined with `&`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def _distance(queries: int, keys: int, device: torch.device | None, slots: Tensor | None) -> Tensor:
    """How many places each key lies before each query, [query, key].

    Queries are at `slots`; without them, the last query is at the last key.
    """
    places = torch.arange(keys - queries, keys, device=device) if slots is None else slots
    return places[:, None] - torch.arange(keys, device=device)


def causal_mask(
    queries: int, keys: int, device: torch.device | None = None, *, slots: Int[Tensor, "query"] | None = None
) -> Bool[Tensor, "1 1 query key"]:
    """Each query sees its own position and those before it, aligned bottom-right: the last query sees every key.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.3. The alignment is that of decoding with a cache, where the
    queries are the last of the keys; `slots` says at which keys they are if they are others.
    """
    return (_distance(queries, keys, device, slots) >= 0)[None, None]


def sliding_window_mask(
    queries: int,
    keys: int,
    window: int,
    device: torch.device | None = None,
    *,
    slots: Int[Tensor, "query"] | None = None,
) -> Bool[Tensor, "1 1 query key"]:
    """Each query sees keys fewer than `window` positions away: with causality, the last `window` keys, itself included.

    Beltagy et al. 2020 (arXiv 2004.05150), section 3.1; Jiang et al. 2023 (arXiv 2310.06825), section 2.
    """
    return (_distance(queries, keys, device, slots).abs() < window)[None, None]


def padding_mask(
    is_token: Bool[Tensor, "batch key"],
) -> Bool[Tensor, "batch 1 1 key"]:
    """No query sees padding; `is_token` is True at real tokens."""
    return is_token[:, None, None, :]
