"""How the matrices of linear maps are stored while a model decodes.

A step for one token reads every weight once and does one multiplication with it: how long it takes depends on how many
bytes the weights have. Embeddings, norms, biases, caches and all that is computed stay as they are.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.models.surgery import replaced
from minitransformer.registry import Registered

M = TypeVar("M", bound=nn.Module)


class StoredWeights(Registered, nn.Module, kind="weights"):
    """x Wᵀ + b, where W is stored as `stored`, times a `scale` for each of its rows."""

    stored: Tensor
    scale: Tensor | None
    few_rows: ClassVar[int] = 64
    """up to so many, it pays to widen weights on their way from memory (measured on CPUs)"""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        stored, scale = self.store(linear.weight.detach())
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        product = self.product(x)
        return product if self.bias is None else product + self.bias

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor | None]:
        """`stored` and `scale` for a matrix."""
        raise NotImplementedError

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x Wᵀ."""
        raise NotImplementedError

    @classmethod
    def applied(cls, model: M) -> M:
        """`model` with its matrices stored in this way; it shares its other weights."""
        return replaced(model, ".*", cls)


class Float32(StoredWeights, name="fp32"):
    """As the checkpoint has them: nothing is rounded."""

    few_rows = 8

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, None]:
        return weight, None

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return x @ self.stored.t()

    @classmethod
    def applied(cls, model: M) -> M:
        return model


class BFloat16(StoredWeights, name="bf16"):
    """Half the bytes. Each weight is rounded to 8 significant bits: it changes by a share of 2^-8 at most."""

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, None]:
        return weight.bfloat16(), None

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        # Measured: for more rows than one, a CPU without such instructions multiplies float32 faster.
        if x.device.type == "cpu" and x.numel() > x.size(-1):
            return x @ self.stored.t().to(x.dtype)
        return (x.bfloat16() @ self.stored.t()).to(x.dtype)


class Int8(StoredWeights, name="int8"):
    """A quarter of the bytes. Each weight is rounded to a 127th of the largest of its row, with which it is stored.

    Its change is at most half of that. Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339), section 2.1, for weights
    alone: what they are multiplied with is not rounded to 8 bits.
    """

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(-1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        assert self.scale is not None
        few_rows = x.device.type == "cpu" and x.numel() <= self.few_rows * x.size(-1)
        if few_rows and x.size(-1) % 64 == 0:
            # torch's kernel reads whole blocks of features, and is fast for bfloat16 alone.
            rows = x.reshape(-1, x.size(-1)).bfloat16()
            product = torch.ops.aten._weight_int8pack_mm(rows, self.stored, self.scale.bfloat16())
            return product.to(x.dtype).view(*x.shape[:-1], -1)
        return (x @ self.stored.t().to(x.dtype)) * self.scale
