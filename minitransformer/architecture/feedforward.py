"""Position-wise feed-forward networks: plain and gated, with every activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.linear import OutputProjection, ScoreProjection
from minitransformer.registry import Registered

gelu_tanh = partial(F.gelu, approximate="tanh")


class FeedForward(Registered, nn.Module, kind="feed-forward network"):
    """A position-wise network; `activation` is also used by the `transformed` head."""

    activation: ClassVar[Any] = staticmethod(gelu_tanh)

    def __init__(self, settings: Any, d_model: int, d_ff: int | None = None, *, bias: bool = True) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        raise NotImplementedError

    @classmethod
    def default_width(cls, d_model: int) -> int | None:
        """The default hidden dimension; None for a network without one."""
        return None


class PlainFeedForward(FeedForward):
    """act(x W₁ + b₁) W₂ + b₂. Vaswani et al. 2017 (arXiv 1706.03762), equation 2."""

    def __init__(self, settings: Any, d_model: int, d_ff: int | None = None, *, bias: bool = True) -> None:
        super().__init__(settings, d_model, d_ff, bias=bias)
        d_ff = d_ff or self.default_width(d_model)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = OutputProjection(d_ff, d_model, bias=bias)

    @classmethod
    def default_width(cls, d_model: int) -> int:
        return 4 * d_model

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(FeedForward):
    """(act(x W_gate) ⊙ x W_up) W_down. Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def __init__(self, settings: Any, d_model: int, d_ff: int | None = None, *, bias: bool = True) -> None:
        super().__init__(settings, d_model, d_ff, bias=bias)
        d_ff = d_ff or self.default_width(d_model)
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = OutputProjection(d_ff, d_model, bias=bias)

    @classmethod
    def default_width(cls, d_model: int) -> int:
        """8/3 d_model, rounded to a multiple of 8: as many weights as the plain network."""
        return 8 * round(d_model / 3)

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


def load_balancing_loss(
    router_logits: Float[Tensor, "tokens experts"],
    experts_per_token: int,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Float[Tensor, ""]:
    """E Σᵢ fᵢ Pᵢ: the fraction of tokens routed to expert i, times its mean probability; 1 if balanced.

    With `sum_over_ranks`, f is that of the tokens of all ranks, and the loss of all tokens is the sum over ranks.

    Fedus et al. 2021 (Switch, arXiv 2101.03961), equations 4 to 6; with several experts per token, f counts all of
    them.
    """
    experts = router_logits.size(-1)
    chosen = router_logits.topk(experts_per_token).indices.flatten()
    counts = sum_over_ranks(torch.bincount(chosen, minlength=experts))
    tokens = counts.sum() / experts_per_token
    mean_probability = router_logits.float().softmax(-1).sum(0) / tokens
    return experts * (counts / counts.sum() * mean_probability).sum()


class ReLU(PlainFeedForward, name="relu"):
    """max(x, 0)."""

    activation = staticmethod(F.relu)


class GELU(PlainFeedForward, name="gelu"):
    """x Φ(x), exact. Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""

    activation = staticmethod(F.gelu)


class TanhGELU(PlainFeedForward, name="gelu-tanh"):
    """GELU by its tanh approximation. Hendrycks and Gimpel 2016, section 2."""

    activation = staticmethod(gelu_tanh)


class SiLU(PlainFeedForward, name="silu"):
    """x σ(x). Hendrycks and Gimpel 2016, section 2."""

    activation = staticmethod(F.silu)


class SquaredReLU(PlainFeedForward, name="squared-relu"):
    """max(x, 0)². So et al. 2021 (arXiv 2109.08668), section 4.2."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x).square()


class GLU(GatedFeedForward, name="glu"):
    """σ(x). Dauphin et al. 2016 (arXiv 1612.08083), equation 1."""

    activation = staticmethod(torch.sigmoid)


class ReGLU(GatedFeedForward, name="reglu"):
    """max(x, 0)."""

    activation = staticmethod(F.relu)


class GEGLU(GatedFeedForward, name="geglu"):
    """Exact GELU."""

    activation = staticmethod(F.gelu)


class TanhGEGLU(GatedFeedForward, name="geglu-tanh"):
    """GELU by its tanh approximation."""

    activation = staticmethod(gelu_tanh)


class SwiGLU(GatedFeedForward, name="swiglu"):
    """x σ(x)."""

    activation = staticmethod(F.silu)
