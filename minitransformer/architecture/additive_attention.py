"""Additive attention (Bahdanau): a small network scores each key."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def additive_attention_weights(
    q: Float[Tensor, "batch query hidden"],
    k: Float[Tensor, "batch key hidden"],
    v: Float[Tensor, "hidden"],
    *,
    mask: Bool[Tensor, "#batch #query key"] | None = None,
) -> Float[Tensor, "batch query key"]:
    """softmax(vᵀ tanh(q + k)) over the keys that `mask` allows: each row sums to 1, or is 0 if none is allowed.

    `q` and `k` are W_a s and U_a h, already projected. Bahdanau et al. 2014 (arXiv 1409.0473), appendix A.1.2.
    """
    scores = (q[:, :, None] + k[:, None]).tanh() @ v
    if mask is None:
        return scores.softmax(-1)
    # The lowest finite number instead of -inf avoids NaN in the gradient of a row without any key.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)


class AdditiveAttention(nn.Module):
    """c = Σⱼ αⱼ hⱼ, where α are the `additive_attention_weights` of a state s and the annotations h.

    Bahdanau et al. 2014 (arXiv 1409.0473), equations 5 and 6.
    """

    def __init__(self, state_features: int, annotation_features: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(state_features, hidden, bias=False)
        self.key = nn.Linear(annotation_features, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(
        self,
        state: Float[Tensor, "batch state"],
        annotations: Float[Tensor, "batch key annotation"],
        keys: Float[Tensor, "batch key hidden"],
        is_token: Bool[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch annotation"]:
        """The context vector of one state; `keys` are `self.key(annotations)`, shared by all states."""
        mask = None if is_token is None else is_token[:, None]
        weights = additive_attention_weights(self.query(state)[:, None], keys, self.score.weight[0], mask=mask)
        return (weights @ annotations)[:, 0]
