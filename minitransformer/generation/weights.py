"""How weights are stored, and read, while a model decodes.

A step for one token reads every weight once and does one multiplication with it: how long it takes depends on how many
bytes the weights have, and on how fast these are read. Only matrices of linear maps are stored otherwise; embeddings,
norms, biases, caches and all that is computed stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.generation import kernel
from minitransformer.generation.recording import with_modules
from minitransformer.registry import Registered

M = TypeVar("M", bound=nn.Module)
FEW_WEIGHTS = 1 << 21
"""models with fewer fit into caches, and gain nothing from the kernel (measured)"""


class Weights(Registered, kind="weights"):
    """A way to store the W of x Wᵀ: as `stored`, times a `scale` for each of its rows."""

    stored: Tensor
    scale: Tensor | None = None
    few_rows: ClassVar[int] = 64
    """up to so many, our kernel is faster than torch's (measured, with weights that are widened for these)"""

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        raise NotImplementedError

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x Wᵀ by torch's own kernels."""
        raise NotImplementedError

    @classmethod
    def applied(cls, model: M, report: Callable[[str], None] = lambda line: None) -> M:
        """`model` with its matrices stored in this way, for evaluation only; it shares its other weights.

        On CPUs, rows are multiplied by a kernel of our own (`row_product.cpp`) where one can be compiled and pays.
        That depends on the machine and the model alone, so that the same seed gives the same text, however long it is.
        `report` is told what is done, if it is not that.
        """
        why_not = _why_no_kernel(model, report)
        if why_not:
            report(f"{cls.name} weights are multiplied by torch's own kernels, as {why_not}")
        return _with_stored(model, cls, kernel=not why_not)


class Float32(Weights, name="fp32"):
    """As the checkpoint has them: nothing is rounded."""

    few_rows = 8

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        self.stored = weight

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return x @ self.stored.t()

    @classmethod
    def applied(cls, model: M, report: Callable[[str], None] = lambda line: None) -> M:
        return model if _why_no_kernel(model, report) else _with_stored(model, cls, kernel=True)


class BFloat16(Weights, name="bf16"):
    """Half the bytes. Each weight is rounded to 8 significant bits: it changes by a share of 2^-8 at most."""

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        self.stored = weight.bfloat16()

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        # Measured: for more rows than one, a CPU without such instructions multiplies float32 faster.
        if x.device.type == "cpu" and x.numel() > x.size(-1):
            return x @ self.stored.t().to(x.dtype)
        return (x.bfloat16() @ self.stored.t()).to(x.dtype)


class Int8(Weights, name="int8"):
    """A quarter of the bytes. Each weight is rounded to a 127th of the largest of its row, with which it is stored.

    Its change is at most half of that. Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339), section 2.1, for weights
    alone: what they are multiplied with is not rounded to 8 bits.
    """

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        self.scale = weight.abs().amax(-1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        self.stored = (weight / self.scale[:, None]).round().to(torch.int8)

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        assert self.scale is not None
        few_rows = x.device.type == "cpu" and x.numel() <= self.few_rows * x.size(-1)
        if few_rows and x.size(-1) % 64 == 0:
            # torch's kernel reads whole blocks of features, and is fast for bfloat16 alone.
            rows = x.reshape(-1, x.size(-1)).bfloat16()
            product = torch.ops.aten._weight_int8pack_mm(rows, self.stored, self.scale.bfloat16())
            return product.to(x.dtype).view(*x.shape[:-1], -1)
        return (x @ self.stored.t().to(x.dtype)) * self.scale


class StoredLinear(nn.Linear):
    """x Wᵀ + b with W as `weights` store it; with `kernel`, by the kernel that is there then."""

    weights: Weights
    kernel: bool

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.kernel and x.dtype == torch.float32 and x.numel() <= self.weights.few_rows * x.size(-1):
            product = torch.ops.minitransformer.row_product
            return product(x.contiguous(), self.weights.stored, self.weights.scale, self.bias)
        plain = self.weights.product(x)
        return plain if self.bias is None else plain + self.bias


def _with_stored(model: M, kind: type[Weights], kernel: bool) -> M:
    def replace(module: nn.Module) -> nn.Module | None:
        return _stored(module, kind(module.weight.detach()), kernel) if isinstance(module, nn.Linear) else None

    return with_modules(model, replace)


def _stored(linear: nn.Linear, weights: Weights, kernel: bool) -> nn.Linear:
    clone = copy.copy(linear)
    clone.__class__ = _storing(type(linear))  # type: ignore[arg-type]
    bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    clone._parameters = {"bias": bias}
    clone.weights, clone.kernel = weights, kernel  # type: ignore[assignment]
    return clone


@cache
def _storing(kind: type[nn.Linear]) -> type[nn.Linear]:
    """`kind`, which may do more than its product, such as a head, with the product of `StoredLinear`."""
    bases = (StoredLinear,) if kind is nn.Linear else (kind, StoredLinear)
    return type(kind.__name__, bases, {})


def _why_no_kernel(model: nn.Module, report: Callable[[str], None]) -> str | None:
    """Why rows are not multiplied by our own kernel, in words that follow "as", or None if they are."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if any(linear.weight.device.type != "cpu" for linear in linears):
        return "ours is for CPUs"
    if any(linear.weight.dtype != torch.float32 for linear in linears):
        return "ours is for models in float32"
    if sum(linear.weight.numel() for linear in linears) < FEW_WEIGHTS:
        return "compiling another does not pay for so small a model"
    try:
        kernel.prepare(report)
    except kernel.CannotCompile as reason:
        return str(reason)
    return None
