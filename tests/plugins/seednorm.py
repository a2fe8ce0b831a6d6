"""A norm whose gains depend on what it reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitransformer.architecture.norms import Norm, eps_setting


class SeeDNorm(Norm, name="seednorm"):
    """(tanh(x · β) α + γ) ⊙ x / √(mean(x²) + eps), from γ = 1, β = 0 and α = 1: at first, RMSNorm.

    Cai et al. 2025 (arXiv 2510.22777), equation 2, as others have built it (there is no code of the authors'); that α
    starts at 1 was not verified.
    """

    undoes_scale = False

    @dataclass(frozen=True)
    class Settings:
        eps: float = eps_setting()

    def __init__(self, settings: Settings, features: int, *, bias: bool = True) -> None:
        super().__init__(settings, features)
        self.eps = settings.eps
        self.alpha, self.beta = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        gains = (x * self.beta).sum(-1, keepdim=True).tanh() * self.alpha + self.weight
        return (gains * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)
