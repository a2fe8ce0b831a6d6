"""Placements that scale the stream or the branch, by the depth of the stack or of the layer.

Notation: x is the residual stream, f the sublayer (attention or feed-forward), N the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.residual.base import BranchGains, MakeNorm, Place, Residual, Sublayer


class DeepNorm(Residual, name="deepnorm"):
    """x ← N(α x + f(x)); initial values, outputs and feed-forward weights are scaled by β.

    A single stack of L layers: α = (2L)^¼, β = (8L)^-¼. An encoder of N layers with a decoder of M: α = 0.81
    (N⁴M)^¹⁄₁₆, β = 0.87 (N⁴M)^-¹⁄₁₆; that decoder: α = (3M)^¼, β = (12M)^-¼. Wang et al. 2022 (arXiv 2203.00555),
    figure 2; the authors' code (torchscale) has 1.15 instead of 0.87, with the exponent's sign lost.
    """

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.alpha, self.beta = self.constants(place)

    @staticmethod
    def constants(place: Place) -> tuple[float, float]:
        """α and β."""
        layers = place.num_layers
        if place.has_memory:
            return (3 * layers) ** 0.25, (12 * layers) ** -0.25
        if place.partner_layers:
            product = layers**4 * place.partner_layers
            return 0.81 * product ** (1 / 16), 0.87 * product ** (-1 / 16)
        return (2 * layers) ** 0.25, (8 * layers) ** -0.25

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(self.alpha * x + self.dropout(sublayer(x)))

    def branch_gains(self) -> BranchGains:
        return BranchGains(values=self.beta)


class Admin(Residual, name="admin"):
    """x ← N(ω ⊙ x + f(x)), where ω starts as the standard deviation that Pre-LN's stream would have here.

    `calibrate` determines it in one forward pass, with dropout: ω₁ = 1 and ω_{k+1}² = Var(ω_k ⊙ x_k) + Var f_k(x_k), so
    that ω₂ is small if the embeddings are. Without it, ω is 1, as in Post-LN; afterwards ω is learned. Liu et al. 2020
    (arXiv 2004.08249), section 4.2, with the variances of the authors' code (LiyuanLucasLiu/Transformer-Clinic).
    """

    class Shared(Residual.Shared):
        @torch.no_grad()
        def calibrate(self, connections: Sequence[Residual], run: Callable[[], object]) -> None:
            variance = torch.ones(())

            def scale_stream(connection: nn.Module, inputs: tuple[Tensor, Sublayer]) -> None:
                nonlocal variance
                omega = connection.omega
                omega.copy_(variance.sqrt().expand_as(omega))  # type: ignore[operator, arg-type]
                variance = (omega * inputs[0]).float().var(correction=0)  # type: ignore[operator]

            def add_branch(_: nn.Module, __: Any, branch: Tensor) -> None:
                nonlocal variance
                variance = variance + branch.float().var(correction=0)

            hooks = [connection.register_forward_pre_hook(scale_stream) for connection in connections]
            hooks += [connection.dropout.register_forward_hook(add_branch) for connection in connections]
            try:
                run()
            finally:
                for hook in hooks:
                    hook.remove()

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.omega = nn.Parameter(torch.ones_like(self.norm.weight))  # type: ignore[arg-type]

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(self.omega * x + self.dropout(sublayer(x)))


class LayerNormScaling(Residual, name="lns"):
    """x ← x + f(N(x) / √l) in layer l, counted from 1, and one norm after the last block.

    Sun et al. 2025 (The Curse of Depth, arXiv 2502.05795), equation 8.
    """

    has_final_norm = True

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.scale = (place.layer + 1) ** -0.5

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x) * self.scale))


class Keel(Residual, name="keel"):
    """x ← N₂(α x + f(N₁(x))), where α is the number of residual connections of the stack.

    That is two per layer, three with cross-attention, and one in parallel blocks, whose sublayers share it. The first
    block is like all others here; whether the paper treats it differently was not verified. Chen and Wei 2026 (arXiv
    2601.19895).
    """

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.output_norm = make_norm()
        self.alpha = float(place.num_connections)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.output_norm(self.alpha * x + self.dropout(sublayer(self.norm(x))))


class GPAS(Residual, name="gpas"):
    """x ← x + f(N(x)), then x ← x − SiLU(g_l) · sg(x) with sg the stop-gradient: x shrinks, and its gradient does not.

    The gate g_l is learned, initially 0, and shared by both sublayers of layer l; one norm after the last block. Chen
    et al. 2025 (arXiv 2506.22049), section 3, on top of Pre-LN, as in the authors' code (dandingsky/GPAS).
    """

    has_final_norm = True

    class Shared(Residual.Shared):
        def __init__(self, settings: GPAS.Settings, places: Sequence[Place]) -> None:
            super().__init__(settings, places)
            self.gates = nn.Parameter(torch.zeros(places[0].num_layers))

        def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.gates

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        x, gates = stream
        x = x + self.dropout(sublayer(self.norm(x)))
        return x - F.silu(gates[self.place.layer]) * x.detach(), gates
