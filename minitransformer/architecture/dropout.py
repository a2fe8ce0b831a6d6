"""Dropout by row: what is dropped does not depend on how a batch is divided into micro-batches and ranks.

On a CPU, its random numbers are also faster than torch's, which take longer than attention itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LEVELS = 1 << 16
"""number of values of a random 16-bit number"""
ROW_STRIDE = 0x9E3779B97F4A7C15
"""difference of the seeds of neighbouring rows: odd, so that all differ"""
_first_row: ContextVar[int] = ContextVar("first_row", default=0)


@contextmanager
def rows_from(first: int) -> Iterator[None]:
    """Forward passes inside are over the rows `first`, `first` + 1, … of a larger batch.

    After the same `torch.manual_seed`, they drop what a forward pass over the whole batch drops in these rows.
    """
    before = _first_row.set(first)
    try:
        yield
    finally:
        _first_row.reset(before)


def apply_dropout(x: Float[Tensor, "*shape"], p: float) -> Float[Tensor, "*shape"]:
    """x with each element 0 with probability p, and otherwise divided by 1 − p, which keeps the mean.

    On a CPU, an element takes 16 random bits instead of a random float: p becomes the nearest multiple of 2⁻¹⁶, in
    the division too; and what is dropped in a row (the first dimension) depends on the state of torch's generator and
    on the row's index alone. Srivastava et al. 2014 (Dropout, JMLR 15), section 4, as inverted dropout.
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
    """Random 16-bit integers in the shape of x, four from each 64-bit random number, with a generator for each row."""
    count = x[:1].numel()
    numbers = torch.empty(len(x), -(-count // 4), dtype=torch.int64)
    seed, generator = int(torch.randint(1 << 62, ())), torch.Generator()
    for index, row in enumerate(numbers, start=_first_row.get()):
        generator.manual_seed((seed + index * ROW_STRIDE) % (1 << 63))
        row.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return numbers.view(torch.int16)[:, :count].reshape(x.shape)


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
