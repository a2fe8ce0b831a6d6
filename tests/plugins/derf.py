"""A function in the place of a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitransformer.architecture.norms import Norm, bias_setting, has_bias


class Derf(Norm, name="derf"):
    """γ erf(a x + s) + b, with one learned a, from ½, and one s, from 0: no norm, but in the place of one.

    Chen et al. 2025 (arXiv 2512.10938), equation 10; a and s start as in public re-implementations.
    """

    undoes_scale = False

    @dataclass(frozen=True)
    class Settings:
        bias: bool | None = bias_setting()

    def __init__(self, settings: Settings, features: int, *, bias: bool = True) -> None:
        super().__init__(settings, features)
        self.slope, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.bias = nn.Parameter(torch.zeros(features)) if has_bias(settings.bias, bias) else None

    def forward(self, x: Tensor) -> Tensor:
        squashed = self.weight * torch.erf(self.slope * x + self.shift)
        return squashed if self.bias is None else squashed + self.bias
