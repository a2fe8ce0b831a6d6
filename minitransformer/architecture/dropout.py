"""Dropout with fast random numbers on a CPU, where torch's takes longer than attention itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LEVELS = 1 << 16
"""number of values of a random 16-bit number"""


def apply_dropout(x: Float[Tensor, "*shape"], p: float) -> Float[Tensor, "*shape"]:
    """x with each element 0 with probability p, and otherwise divided by 1 − p, which keeps the mean.

    On a CPU, an element takes 16 random bits instead of a random float: p becomes the nearest multiple of 2⁻¹⁶, in
    the division too. Srivastava et al. 2014 (Dropout, JMLR 15), section 4, as inverted dropout.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = round(p * LEVELS)
    if dropped == LEVELS:
        return torch.zeros_like(x)
    levels = torch.ops.minitransformer_dropout.random_levels(x.detach())
    return _Dropped.apply(x, levels >= dropped - LEVELS // 2, LEVELS / (LEVELS - dropped))


class Dropout(nn.Dropout):
    """`apply_dropout` in training mode, the identity in eval mode."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return apply_dropout(x, self.p) if self.training else x


def _random_levels(x: Tensor) -> Tensor:
    """Random 16-bit integers in the shape of x, four from each 64-bit random number."""
    count = x.numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    return numbers.view(torch.int16)[:count].view(x.shape)


# A custom operator, so that compiled models draw the same numbers. It is given x itself, so that
# calls with equal arguments are not merged.
_LIBRARY = torch.library.Library("minitransformer_dropout", "DEF")
_LIBRARY.define("random_levels(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_LIBRARY.impl("random_levels", _random_levels, "CPU")
torch.library.register_fake(
    "minitransformer_dropout::random_levels", lambda x: torch.empty(x.shape, dtype=torch.int16), lib=_LIBRARY
)


class _Dropped(torch.autograd.Function):
    """x · keep · scale, which saves one byte per element for the backward pass, and no copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.scale), None, None
