"""Linear layers in FP8, which GPUs since Ada and Hopper multiply twice as fast as 16 bits.

Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv 2209.05433): E4M3, with more precision, in the
forward pass, E5M2, with more range, for gradients. Each tensor is scaled so that its largest element becomes the
largest number of its format.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

FORWARDS, BACKWARDS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""sizes must be multiples of this for the kernels"""


class Float8Products(TorchFunctionMode):
    """Within it, `F.linear` multiplies in FP8 and returns bfloat16, where the sizes allow it."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        called = linear if function is F.linear and _fits(*args[:2]) else function
        return called(*args, **(kwargs or {}))


def linear(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + b with x, W and the factors of their gradients in FP8."""
    product = _Product.apply(x, weight)
    return product if bias is None else product + bias.to(product.dtype)


def quantised(
    x: Float[Tensor, "rows columns"], dtype: torch.dtype
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, ""]]:
    """x / scale in FP8, row-major, and `scale`."""
    scale = x.abs().amax().float().clamp(min=1e-30) / torch.finfo(dtype).max
    return (x / scale).to(dtype).contiguous(), scale


def _fits(x: Tensor, weight: Tensor) -> bool:
    return all(size % MULTIPLE == 0 for size in (x.numel() // x.size(-1), *weight.shape))


class _Product(torch.autograd.Function):
    """x Wᵀ, which saves one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, rows_scale = quantised(x.flatten(0, -2), FORWARDS)
        stored, weight_scale = quantised(weight, FORWARDS)
        ctx.save_for_backward(rows, rows_scale, stored, weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        # On a CPU, torch composes it of operations that autocast would round to bfloat16 again.
        with torch.autocast(x.device.type, enabled=False):
            product = _multiplied(rows, rows_scale, stored.t(), weight_scale, torch.bfloat16, fast=True)
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, rows_scale, stored, weight_scale = ctx.saved_tensors
        arriving, scale = quantised(gradient.flatten(0, -2), BACKWARDS)
        to_x = _multiplied(arriving, scale, _by_columns(stored), weight_scale, ctx.dtypes[0])
        to_weight = _multiplied(arriving.t().contiguous(), scale, _by_columns(rows), rows_scale, ctx.dtypes[1])
        return to_x.view(*gradient.shape[:-1], -1), to_weight


def _multiplied(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b, where a is row-major and b column-major; `fast` accumulates in lower precision on a GPU."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()
