"""Storage formats of weight matrices for decoding.

A decode step for one token reads every weight once and does one multiplication with it: its time is that of reading
the weights from memory. Embeddings, norms, biases, caches and activations are not converted.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.models.int4 import BLOCK, Int4Linear, dequantise_groups, quantise_groups
from minitransformer.models.int8 import Int8Linear, quantise_rows
from minitransformer.models.stored import StoredLinear
from minitransformer.models.surgery import copied, replaced
from minitransformer.registry import Registered

M = TypeVar("M", bound=nn.Module)


class StoredWeights(Registered, nn.Module, kind="weights"):
    """x Wᵀ + b, where W is stored as `stored`, times a `scale` for each of its rows, or of their groups.

    `linear` is a linear map, or one that is stored in this format already.
    """

    stored: Tensor
    scale: Tensor | None
    bias: Tensor | None
    few_rows: ClassVar[int] = 64
    """maximum rows for which converting weights in the product is faster (measured on CPUs)"""

    def __init__(self, linear: nn.Linear | StoredLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        stored, scale = (weight, linear.scale) if isinstance(linear, StoredLinear) else self.store(weight)
        self.register_buffer("stored", stored)
        self.register_buffer("scale", None if scale is None else scale.detach())
        self.register_parameter("bias", linear.bias)  # type: ignore[arg-type]

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
        """A copy of `model` with its matrices in this format; it shares the other weights.

        Raises `UserError` for a model whose matrices are in another one.
        """
        stored = {part.name for part in _of_run(model).modules() if isinstance(part, StoredWeights)}
        if stored:
            raise UserError(f"weights {cls.name!r} has no effect on a model compressed to {min(stored)}: leave it out")
        return replaced(model, ".*", cls)


def _of_run(model: M) -> M:
    """`model`, whose stored matrices, if it is compressed, are multiplied as they are."""
    kinds: dict[Any, type[StoredWeights]] = {Int8Linear: Int8, Int4Linear: Int4}
    if not any(type(module) in kinds for module in model.modules()):
        return model

    def replace(name: str, module: Any) -> nn.Module | None:
        return kinds[type(module)](module) if type(module) in kinds else None

    return copied(model, replace)


class Float32(StoredWeights, name="fp32"):
    """The weights of the checkpoint, unchanged."""

    few_rows = 8

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, None]:
        return weight, None

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return x @ self.stored.t()

    @classmethod
    def applied(cls, model: M) -> M:
        return _of_run(model)


class BFloat16(StoredWeights, name="bf16"):
    """Half the bytes. Each weight is rounded to 8 significant bits: a relative error of at most 2^-8."""

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, None]:
        return weight.bfloat16(), None

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        # Measured: for more rows than one, a CPU without such instructions multiplies float32 faster.
        if x.device.type == "cpu" and x.numel() > x.size(-1):
            return x @ self.stored.t().to(x.dtype)
        return (x.bfloat16() @ self.stored.t()).to(x.dtype)


class Int8(StoredWeights, name="int8"):
    """A quarter of the bytes. Each weight is rounded to a multiple of its row's scale, max |w| / 127.

    Activations are not rounded to 8 bits: our kernel takes 16 bits of them, torch's bfloat16.
    """

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        return quantise_rows(weight)

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        assert self.scale is not None
        few_rows = x.device.type == "cpu" and x.numel() <= self.few_rows * x.size(-1)
        if few_rows and x.size(-1) % 64 == 0:
            # torch's kernel reads whole blocks of features, and is fast for bfloat16 alone.
            rows = x.reshape(-1, x.size(-1)).bfloat16()
            product = torch.ops.aten._weight_int8pack_mm(rows, self.stored, self.scale.bfloat16())
            return product.to(x.dtype).view(*x.shape[:-1], -1)
        return (x @ self.stored.t().to(x.dtype)) * self.scale


class Int4(StoredWeights, name="int4"):
    """An eighth of the bytes. Each weight is rounded to a multiple of its group's scale, max |w| / 7.

    Calibrated weights (`minitransformer compress`) keep more of a model's quality.
    """

    few_rows = 8

    @classmethod
    def store(cls, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        return quantise_groups(weight, BLOCK)

    def product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        assert self.scale is not None
        return x @ dequantise_groups(self.stored, self.scale, self.in_features).t()
