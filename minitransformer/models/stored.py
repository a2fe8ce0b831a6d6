"""Linear maps and tables with matrices in fewer bits, which are not trained; what is around them may be."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.architecture.embeddings import HeadAround, LMHead
from minitransformer.models.surgery import copied

M = TypeVar("M", bound=nn.Module)


class StoredLinear(nn.Module):
    """x Wᵀ + b in place of `linear`, with a W that `weight` and `scale` stand for, made again in every pass.

    Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), equation 5. Both are 0 until they are loaded or set by `hold`. An
    adapter's update of the product may be its child `lora`.
    """

    weights_per_element: ClassVar[int] = 1
    """weights in an element of `weight`"""

    def __init__(self, linear: nn.Linear, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = type(linear), linear.in_features, linear.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.lora: Any = None

    def quantise(self, matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        """The `weight` and the `scale` that are nearest to `matrix`, or to rows of it."""
        raise NotImplementedError

    @staticmethod
    def dequantise(weight: Tensor, scale: Tensor, features: int) -> Float[Tensor, "out in"]:
        """The matrix with so many `features` that `weight` and `scale` stand for."""
        raise NotImplementedError

    @torch.no_grad()
    def hold(self, weight: Tensor, scale: Tensor) -> None:
        self.weight.copy_(weight)
        self.scale.copy_(scale)

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        product: Tensor = _Product.apply(x, self.dequantise, self.bias, self.weight, self.scale)
        return product if self.lora is None else self.lora(product, x)

    def matrix(self) -> Float[Tensor, "out in"]:
        """W, and the update of an adapter, in float64."""
        matrix = self.dequantise(self.weight, self.scale, self.in_features).double()
        return matrix if self.lora is None else matrix + self.lora.matrix()

    @torch.no_grad()
    def plain_weight(self) -> nn.Parameter:
        return nn.Parameter(self.matrix().to(self.scale.dtype))

    def plain(self) -> nn.Linear:
        """The linear map that computes the same."""
        return linear_map(self.kind, self.plain_weight(), self.bias)


class StoredTable(nn.Module):
    """The rows of an embedding table, stored as the matrix of `linear`, which may be the product of a tied head."""

    def __init__(self, linear: StoredLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = linear.out_features, linear.in_features
        self.weight, self.scale, self.dequantise = linear.weight, linear.scale, linear.dequantise

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, rows: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch features"]:
        found = self.dequantise(self.weight[rows.flatten()], self.scale[rows.flatten()], self.embedding_dim)
        return found.view(*rows.shape, self.embedding_dim)

    @torch.no_grad()
    def plain(self) -> nn.Embedding:
        """The table in full."""
        matrix = self.dequantise(self.weight, self.scale, self.embedding_dim)
        return nn.Embedding.from_pretrained(matrix, freeze=False)


def linear_map(kind: type[nn.Linear], weight: Float[Tensor, "out in"], bias: Any) -> nn.Linear:
    """A linear map of this `kind`, with these weights; `bias` is a parameter or None."""
    linear = kind(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear


def in_full(model: M) -> M:
    """A copy of `model` in which every stored matrix, and every linear map with an update, is a plain one.

    It shares all other weights; it is `model` itself if there are none.
    """
    if not any(hasattr(module, "plain") for module in model.modules()):
        return model
    tables: dict[nn.Parameter, nn.Embedding] = {}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, StoredTable):
            tables[module.weight] = module.plain()
            return tables[module.weight]
        if isinstance(module, HeadAround) and isinstance(product := module.product, StoredLinear):
            weight = tables[product.weight].weight if product.weight in tables else product.plain_weight()
            return LMHead.holding(weight, product.bias, module.scale, module.softcap)
        return module.plain() if hasattr(module, "plain") else None  # type: ignore[operator]

    return copied(model, replace)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which keeps neither x nor W in full precision for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantise: Any, bias: Tensor | None, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype, ctx.dequantise, ctx.features = x.dtype, dequantise, x.size(-1)
        return F.linear(x, dequantise(weight, scale, x.size(-1)), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            matrix = ctx.dequantise(*ctx.saved_tensors, ctx.features)
            to_x = (gradient @ matrix.to(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = gradient.flatten(0, -2).sum(0)
        return to_x, None, to_bias, None, None
