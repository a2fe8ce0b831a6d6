"""Boolean masks, True = may attend, shaped to broadcast over [batch, heads, query, key]; combined with `&`."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor


def causal_mask(
    queries: Int[Tensor, "#batch query"], keys: Int[Tensor, "#batch key"]
) -> Bool[Tensor, "#batch 1 query key"]:
    """A query at position p may attend to keys at positions up to p.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.3.
    """
    return keys[:, None, None, :] <= queries[:, None, :, None]


def sliding_window_mask(
    queries: Int[Tensor, "#batch query"], keys: Int[Tensor, "#batch key"], window: int
) -> Bool[Tensor, "#batch 1 query key"]:
    """A query may attend to keys fewer than `window` positions away: with causality, the last `window` keys.

    Beltagy et al. 2020 (arXiv 2004.05150), section 3.1; Jiang et al. 2023 (arXiv 2310.06825), section 2.
    """
    return (queries[:, None, :, None] - keys[:, None, None, :]).abs() < window


OF_ALL = -1
"""number of a document that all others of its row see, such as a prompt"""


def document_mask(documents: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch 1 length length"]:
    """A query may attend to keys of its own document: packed sequences do not see each other.

    Krell et al. 2021 (arXiv 2107.02027), section 3.2.4. Every query may attend to keys of document OF_ALL.
    """
    keys = documents[:, None, None, :]
    return (documents[:, None, :, None] == keys) | (keys == OF_ALL)


def padding_mask(is_token: Bool[Tensor, "#batch key"]) -> Bool[Tensor, "#batch 1 1 key"]:
    """No query may attend to padding or to an empty slot; `is_token` is True at real tokens."""
    return is_token[:, None, None, :]
