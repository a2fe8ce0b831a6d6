"""A placement with n streams that are mixed anew for each token, beside its second statement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.residual import Residual
from minitransformer.lab.equations import states
from minitransformer.settings import setting


class HyperConnections(Residual, name="hyper-connections"):
    """H ← Aᵣᵀ H + bᵀ f(N(aᵀ H)) for n streams H [n, d_model]; the output is N of their sum.

    (a, Aᵣ) [n, 1 + n] and b [n] are of each token: s tanh(norm(H) W) plus constants, from W = 0 and s = 0.01, a = e_k
    for the k-th sublayer (modulo n), Aᵣ = I and b = 1. Zhu et al. 2024 (arXiv 2409.19606), section 2, dynamic form;
    that the norm has no gain was chosen here, as W can absorb it.
    """

    has_final_norm = True

    @dataclass(frozen=True)
    class Settings:
        streams: int = setting(2, at_least=1, at_most=16, help="parallel residual streams n")

    class Shared(Residual.Shared):
        def __init__(self, settings, places) -> None:
            super().__init__(settings, places)
            self.streams = settings.streams

        def open(self, x: Tensor) -> Tensor:
            return torch.stack([x] * self.streams, -2)

        def state(self, stream: Tensor) -> Tensor:
            return stream.sum(-2)

        def close(self, stream: Tensor, final_norm: nn.Module) -> Tensor:
            return final_norm(stream.sum(-2))

    def __init__(self, settings: Settings, make_norm, dropout, place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        n = settings.streams
        self.alpha = nn.Parameter(torch.cat([torch.eye(n)[:, [place.index % n]], torch.eye(n)], -1))
        self.beta = nn.Parameter(torch.ones(n))
        self.alpha_map = nn.Parameter(torch.zeros(place.d_model, 1 + n))
        self.beta_map = nn.Parameter(torch.zeros(place.d_model))
        self.scales = nn.Parameter(torch.full((2,), 0.01))

    def forward(self, stream: Tensor, sublayer) -> Tensor:
        normed = F.layer_norm(stream, stream.shape[-1:])
        alpha = self.scales[0] * (normed @ self.alpha_map).tanh() + self.alpha
        beta = self.scales[1] * (normed @ self.beta_map).tanh() + self.beta
        mixed = alpha.transpose(-2, -1) @ stream
        branch = self.dropout(sublayer(self.norm(mixed[..., 0, :])))
        return mixed[..., 1:, :] + beta[..., None] * branch[..., None, :]


def first_alpha(name: str, depth) -> Tensor:
    _, _, layer, connection, _ = name.split(".")
    sublayers = ["attention", *(["cross_attention"] if depth.has_memory else []), "feedforward"]
    k = int(layer) * len(sublayers) + sublayers.index(connection.removesuffix("_residual"))
    return torch.tensor([[1.0 - k % 2, 1.0, 0.0], [0.0 + k % 2, 0.0, 1.0]])


@states("hyper-connections", starts={"alpha": first_alpha, "alpha_map": 0.0, "beta_map": 0.0, "scales": 0.01})
def hyper_connections(x, stack):
    streams = [x, x]
    for branch in stack.branches:
        normed = [(h - h.mean(-1, keepdim=True)) for h in streams]
        normed = [h / ((h**2).mean(-1, keepdim=True) + 1e-5).sqrt() for h in normed]
        scale_a, scale_b = branch.weight("scales")
        a = [
            scale_a * (h @ branch.weight("alpha_map")).tanh() + branch.weight("alpha")[i] for i, h in enumerate(normed)
        ]
        b = [scale_b * (h @ branch.weight("beta_map")).tanh() + branch.weight("beta")[i] for i, h in enumerate(normed)]
        read, *mixed = (sum(a[i][..., [column]] * streams[i] for i in range(2)) for column in range(3))
        o = branch.f(branch.norm(read))
        streams = [mixed[i] + b[i][..., None] * o for i in range(2)]
    return stack.norm(streams[0] + streams[1])
