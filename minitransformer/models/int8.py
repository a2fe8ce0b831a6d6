"""Matrices of 8-bit integers, with a scale for each row, and linear maps that train what is around one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn


def quantise_rows(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out"]]:
    """Each weight as a multiple of its row's scale, max |w| / 127, to which it is rounded; and the scales.

    The error is at most half the scale. Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339), section 2.1, for weights
    alone.
    """
    scale = weight.abs().amax(-1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def dequantise_rows(stored: Int8[Tensor, "out in"], scale: Float[Tensor, "out"]) -> Float[Tensor, "out in"]:
    """The matrix that `quantise_rows` has rounded to."""
    return stored.to(scale.dtype).mul_(scale[:, None])


class Int8Linear(nn.Module):
    """x Wᵀ + b in place of `linear`, with a W in 8 bits that is not trained.

    W is `weight` times a `scale` for each row, and is made again in every pass. Dettmers et al. 2023 (QLoRA, arXiv
    2305.14314), equation 5. Both are those of a base, from which they are loaded, and 0 before.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = type(linear), linear.in_features, linear.out_features
        stored = torch.empty(linear.weight.shape, dtype=torch.int8, device=linear.weight.device)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.scale = nn.Parameter(linear.weight.new_empty(self.out_features), requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        product: Tensor = _Product.apply(x, self.weight, self.scale, self.bias)
        return product

    def matrix(self) -> Float[Tensor, "out in"]:
        """W, in float64."""
        return dequantise_rows(self.weight, self.scale).double()

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """The linear map that computes the same."""
        return linear_map(self.kind, self.matrix().to(self.scale.dtype), self.bias)


def linear_map(kind: type[nn.Linear], weight: Float[Tensor, "out in"], bias: Any) -> nn.Linear:
    """A linear map of this `kind`, with these weights; `bias` is a parameter or None."""
    linear = kind(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which keeps neither x nor W in full precision for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.dtype = x.dtype
        return F.linear(x, dequantise_rows(stored, scale), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ dequantise_rows(*ctx.saved_tensors).to(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            to_bias = gradient.flatten(0, -2).sum(0)
        return to_x, None, None, to_bias
