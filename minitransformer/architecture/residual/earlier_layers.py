"""Placements in which a layer reads the outputs of individual earlier layers, not only their sum.

Notation: f is the sublayer (attention or feed-forward), N the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitransformer.architecture.norms import fused_rms_norm
from minitransformer.architecture.residual.base import RMS_EPS, MakeNorm, Place, Residual, Sublayer
from minitransformer.settings import setting

Outputs = tuple[Tensor, ...]


def attend_over_depth(query: Tensor | None, outputs: Outputs) -> Tensor:
    """Σ_i α_i v_i with α = softmax_i(query · v_i / RMS(v_i)), for each token; without a query, the only v."""
    if query is None:
        return outputs[0]
    v = torch.stack(outputs)  # depth, batch, length, d_model
    weights = fused_rms_norm(v, query, RMS_EPS).sum(-1).softmax(0)
    return (weights[..., None] * v).sum(0)


class AttentionResiduals(Residual, name="attention-residuals"):
    """h_k = Σ_{i<k} α_i v_i with α = softmax_i(q_k · v_i / RMS(v_i)), v_k = f(N(h_k)), where v₀ are the embeddings.

    The output is N of one more such sum, over all v. Queries q_k [d_model] are learned, initially 0, which gives the
    mean. The first sublayer reads v₀ and has none. Kimi Team 2026 (arXiv 2603.15031), section 3, full version; the gain
    of their norm of v_i is left out, as the query can absorb it. Checked against the equations and pseudocode that they
    publish, which include no complete model.
    """

    has_final_norm = True

    class Shared(Residual.Shared):
        def __init__(self, settings: AttentionResiduals.Settings, places: Sequence[Place]) -> None:
            super().__init__(settings, places)
            self.query = nn.Parameter(torch.zeros(places[0].d_model))

        def open(self, x: Tensor) -> Outputs:
            return (x,)

        def state(self, stream: Outputs) -> Tensor:
            return attend_over_depth(self.query, stream)

    def __init__(
        self, settings: AttentionResiduals.Settings, make_norm: MakeNorm, dropout: float, place: Place
    ) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.query = nn.Parameter(torch.zeros(place.d_model)) if place.index else None

    def forward(self, stream: Outputs, sublayer: Sublayer) -> Outputs:
        return *stream, self.dropout(sublayer(self.norm(attend_over_depth(self.query, stream))))


class ValueResidual(Residual, name="value-residual"):
    """x ← x + f(N(x)), with self-attention over the values λ₁ V₁ + λ₂ V, where V₁ are those of layer 1.

    λ₁ = λ₂ = ½, as in the authors' code, or both are learned per layer, initially ½. One norm after the last block;
    cross-attention is as in Pre-LN. Zhou et al. 2024 (ResFormer, arXiv 2410.17897), section 3; each layer caches the
    values that it attends to, so decoding needs no other cache.
    """

    has_final_norm = True

    @dataclass(frozen=True)
    class Settings:
        learned: bool = setting(False, help="learn λ₁ and λ₂ in each layer, initially ½")

    class Shared(Residual.Shared):
        def open(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    def __init__(self, settings: Settings, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.has_values = place.sublayer in ("attention", "parallel")
        halves = torch.full((2,), 0.5)
        if settings.learned and self.has_values and place.layer:
            self.shares = nn.Parameter(halves)
        else:
            self.register_buffer("shares", halves, persistent=False)

    def forward(self, stream: tuple[Tensor, Tensor | None], sublayer: Sublayer) -> tuple[Tensor, Tensor | None]:
        x, first = stream
        if not self.has_values:
            return x + self.dropout(sublayer(self.norm(x))), first
        seen: list[Tensor] = []

        def mix(values: Tensor) -> Tensor:
            seen.append(values)
            return values if first is None else self.shares[0] * first + self.shares[1] * values

        x = x + self.dropout(sublayer(self.norm(x), mix_values=mix))
        return x, seen[0] if first is None else first
