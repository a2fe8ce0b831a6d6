"""Position-wise feed-forward networks: plain and gated, with every activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.linear import OutputProjection

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


class MakeFeedForward(Protocol):
    def __call__(self, d_model: int, d_ff: int | None = None, *, bias: bool = True) -> nn.Module: ...


# GELU: Hendrycks and Gimpel 2016 (arXiv 1606.08415), exact and by its tanh approximation; SiLU: section 2 there.
FEEDFORWARDS: dict[str, MakeFeedForward] = {
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
