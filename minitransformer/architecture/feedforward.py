"""Position-wise feed-forward networks: plain and gated, with every activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.linear import OutputProjection, ScoreProjection

Activation = Callable[[Tensor], Tensor]
gelu_tanh = partial(F.gelu, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)². So et al. 2021 (arXiv 2109.08668), section 4.2."""
    return F.relu(x).square()


class FeedForward(nn.Module):
    """act(x W₁ + b₁) W₂ + b₂. Vaswani et al. 2017 (arXiv 1706.03762), equation 2."""

    def __init__(self, d_model: int, d_ff: int | None = None, *, activation: Activation, bias: bool = True) -> None:
        super().__init__()
        d_ff = d_ff or 4 * d_model
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = OutputProjection(d_ff, d_model, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nn.Module):
    """(act(x W_gate) ⊙ x W_up) W_down. Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def __init__(self, d_model: int, d_ff: int | None = None, *, activation: Activation, bias: bool = True) -> None:
        super().__init__()
        d_ff = d_ff or 8 * round(d_model / 3)  # as many weights as the plain network, in eights
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = OutputProjection(d_ff, d_model, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """Σᵢ wᵢ Expertᵢ(x) over the `experts_per_token` experts whose router logits x W_r are the highest.

    The weights w are the softmax of those logits alone. Shazeer et al. 2017 (arXiv 1701.06538), section 2; Jiang et al.
    2024 (Mixtral, arXiv 2401.04088), section 2.1.
    """

    def __init__(
        self, make_expert: Callable[[], nn.Module], d_model: int, *, num_experts: int, experts_per_token: int
    ) -> None:
        super().__init__()
        self.router = ScoreProjection(d_model, num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))
        self.experts_per_token = experts_per_token

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        tokens = x.flatten(0, 1)
        logits, chosen = self.router(tokens).topk(self.experts_per_token)  # [tokens, experts_per_token] both
        weights = logits.float().softmax(-1).to(x.dtype)
        mixed = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            weighted = expert(tokens[rows][None])[0] * weights[rows, places][:, None]
            mixed = mixed.index_add(0, rows, weighted.to(x.dtype))
        return mixed.view_as(x)


def load_balancing_loss(router_logits: Float[Tensor, "tokens experts"], experts_per_token: int) -> Float[Tensor, ""]:
    """E Σᵢ fᵢ Pᵢ: the share of choices that fall on expert i, times its mean probability; 1 when all share alike.

    Fedus et al. 2021 (Switch, arXiv 2101.03961), equations 4 to 6; with several choices a token, f counts all of them.
    """
    experts = router_logits.size(-1)
    chosen = router_logits.topk(experts_per_token).indices.flatten()
    share = torch.bincount(chosen, minlength=experts) / chosen.numel()
    return experts * (share * router_logits.float().softmax(-1).mean(0)).sum()


# GELU: Hendrycks and Gimpel 2016 (arXiv 1606.08415), exact and by its tanh approximation; SiLU: section 2 there.
FEEDFORWARDS: dict[str, partial[Any]] = {
    "relu": partial(FeedForward, activation=F.relu),
    "gelu": partial(FeedForward, activation=F.gelu),
    "gelu-tanh": partial(FeedForward, activation=gelu_tanh),
    "silu": partial(FeedForward, activation=F.silu),
    "squared-relu": partial(FeedForward, activation=squared_relu),
    "glu": partial(GatedFeedForward, activation=torch.sigmoid),
    "reglu": partial(GatedFeedForward, activation=F.relu),
    "geglu": partial(GatedFeedForward, activation=F.gelu),
    "geglu-tanh": partial(GatedFeedForward, activation=gelu_tanh),
    "swiglu": partial(GatedFeedForward, activation=F.silu),
}
