"""Products of many rows with matrices in float32, by oneDNN.

torch multiplies float32 by MKL, which uses half of the width of some processors: there, oneDNN is up to 2.5 times as
fast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

MANY_PRODUCTS = 1 << 20
"""multiplications from which oneDNN is faster (measured)"""
# A recording cannot hold a call of this operator, whose `scalars` are a list of optional numbers, but that of a script.
SOURCE = """
def multiply(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
"""


def has_many_products(x: Float[Tensor, "*batch in"], outputs: int) -> bool:
    """Whether `multiply_many_rows` is faster for as many outputs: by shapes and the kind of processor alone."""
    elements = x.nbytes // x.itemsize  # unlike `numel`, no operation of a recording
    many = elements * outputs >= MANY_PRODUCTS
    return many and x.dtype == torch.float32 and x.device.type == "cpu" and has_onednn_for_float32()


@cache
def has_onednn_for_float32() -> bool:
    """Whether torch has oneDNN, and the processor the instructions that MKL may not use."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply_many_rows(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + b, for evaluation only."""
    return _compiled()(x, weight, bias)


@cache
def _compiled() -> Any:
    return torch.jit.CompilationUnit(SOURCE).multiply
