"""Normalisation layers, by hand and by torch's fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.registry import Registered
from minitransformer.settings import setting

SMALLEST = 1.1754943508222875e-38
"""smallest normal float32"""
AT_LEAST_SMALLEST = {"at_least": SMALLEST, "must": f"at least {SMALLEST:.1e}, as less is 0 in float32"}


def eps_setting() -> Any:
    """The setting that norms share."""
    return setting(1e-5, flag="norm-eps", **AT_LEAST_SMALLEST, help="ε, added to the variance")


def bias_setting() -> Any:
    """The setting of norms that can have biases."""
    return setting(None, flag="norm-bias", help="use biases in the norm; None is bias")


def layer_norm(
    x: Float[Tensor, "*batch features"],
    weight: Float[Tensor, "features"],
    bias: Float[Tensor, "features"] | None,
    eps: float,
) -> Float[Tensor, "*batch features"]:
    """(x − mean) / √(variance + eps) · weight + bias. Ba et al. 2016 (arXiv 1607.06450), section 3."""
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normalised * weight if bias is None else normalised * weight + bias


def rms_norm(
    x: Float[Tensor, "*batch features"], weight: Float[Tensor, "features"], eps: float
) -> Float[Tensor, "*batch features"]:
    """x / √(mean(x²) + eps) · weight. Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def fused_rms_norm(
    x: Float[Tensor, "*batch features"], weight: Float[Tensor, "features"], eps: float
) -> Float[Tensor, "*batch features"]:
    """`rms_norm` by torch's fused kernel."""
    if x.dtype == weight.dtype or x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    # Elsewhere autocast converts x to float32; on a CPU, torch would warn and use a slower kernel.
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


class Norm(Registered, nn.Module, kind="norm"):
    """A norm over the last dimension with learnable gains, initially the identity.

    `bias` is the model's setting, for norms without one of their own.
    """

    undoes_scale = True
    """N(a x) = N(x) for a > 0, but for eps"""

    def __init__(self, settings: Any, features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.shape = (features,)
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        raise NotImplementedError


def has_bias(own: bool | None, bias: bool) -> bool:
    """Whether a norm has biases: by its own setting, or else by the model's."""
    return bias if own is None else own


class LayerNorm(Norm, name="layer"):
    """`layer_norm` by torch's fused kernel. Ba et al. 2016 (arXiv 1607.06450)."""

    @dataclass(frozen=True)
    class Settings:
        eps: float = eps_setting()
        bias: bool | None = bias_setting()

    def __init__(self, settings: Settings, features: int, *, bias: bool = True) -> None:
        super().__init__(settings, features)
        self.eps = settings.eps
        self.bias = nn.Parameter(torch.zeros(features)) if has_bias(settings.bias, bias) else None

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNorm(Norm, name="rms"):
    """`rms_norm` by torch's fused kernel; it has no bias. Zhang and Sennrich 2019 (arXiv 1910.07467)."""

    @dataclass(frozen=True)
    class Settings:
        eps: float = eps_setting()

    def __init__(self, settings: Settings, features: int, *, bias: bool = True) -> None:
        super().__init__(settings, features)
        self.eps = settings.eps

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        return fused_rms_norm(x, self.weight, self.eps)


class DyT(Norm, name="dyt"):
    """γ tanh(a x) + b with one learnable a, initially ½: a replacement of a norm, without eps.

    Zhu et al. 2025 (Dynamic Tanh, arXiv 2503.10622), equation 1.
    """

    undoes_scale = False

    @dataclass(frozen=True)
    class Settings:
        bias: bool | None = bias_setting()

    def __init__(self, settings: Settings, features: int, *, bias: bool = True) -> None:
        super().__init__(settings, features)
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.bias = nn.Parameter(torch.zeros(features)) if has_bias(settings.bias, bias) else None

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        squashed = self.weight * (self.alpha * x).tanh()
        return squashed if self.bias is None else squashed + self.bias


class ZeroCentredRMSNorm(RMSNorm, name="rms-zero-centred"):
    """`rms_norm` with the gain 1 + w, so that weight decay pulls it to 1. Gemma (arXiv 2403.08295), its public code."""

    def __init__(self, settings: RMSNorm.Settings, features: int, *, bias: bool = True) -> None:
        super().__init__(settings, features)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        return fused_rms_norm(x, 1 + self.weight, self.eps)
