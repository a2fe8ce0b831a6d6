"""Linear maps that are fast for the few rows of a decode step, for evaluation only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.attention import MultiHeadAttention, project_each, scaled_dot_product_attention
from minitransformer.architecture.embeddings import LMHead
from minitransformer.architecture.kernels import fastest_attention
from minitransformer.generation.fast import row_kernel
from minitransformer.generation.fast.many_rows import has_many_products, multiply_many_rows
from minitransformer.generation.weights import Float32, StoredWeights
from minitransformer.models.joined import has_hooks, is_plain
from minitransformer.models.surgery import copied, is_linear_map

FEW_WEIGHTS = 1 << 21
"""models with fewer fit into the processor's caches, and gain nothing from the kernel (measured)"""
MANY_WEIGHTS = 1 << 17
"""a product of one row with more takes much longer than the call"""
MANY_HEADS = 256
"""of all rows together"""
FEW_ELEMENTS = 1 << 13
"""for which torch's own GELU is faster than oneDNN's (measured)"""
M = TypeVar("M", bound=nn.Module)


def with_row_kernel(model: M, report: Callable[[str], None] = lambda line: None) -> M:
    """A copy of `model`, with the same weights, whose linear maps multiply few rows by the kernel of `row_product.cpp`.

    On CPUs where it can be compiled and is faster; otherwise `model` itself. That depends on the machine and the model
    alone, so that the same seed gives the same text, of any length. `report` is called with what users should know.
    """
    why_not = _why_no_kernel(model, report)
    if why_not is None:
        fast = copied(model, lambda name, module: _with_kernel(module))
        for attention in fast.modules():
            if isinstance(attention, MultiHeadAttention):
                attention.project = project_rows
        return fast
    for stored in sorted({module.name for module in model.modules() if isinstance(module, StoredWeights)}):
        report(f"{stored} weights are multiplied by torch's own kernels, as {why_not}")
    return model


def _with_kernel(module: nn.Module) -> nn.Module | None:
    if isinstance(module, StoredWeights):
        return KernelLinear(module)
    if not is_linear_map(module) or has_hooks(module):
        return None
    assert isinstance(module, nn.Linear)
    fast = KernelLinear(Float32(module))
    return module.around(fast) if isinstance(module, LMHead) else fast


class KernelLinear(nn.Module):
    """x Wᵀ + b by our own kernel for few rows of float32, and as `weights` do it for more."""

    def __init__(self, weights: StoredWeights) -> None:
        super().__init__()
        self.weights, self.in_features, self.out_features = weights, weights.in_features, weights.out_features
        packed = 2 if weights.stored.dtype == torch.uint8 else 1  # two weights of 4 bits each, in whole blocks
        self.padding = packed * weights.stored.size(1) - weights.in_features
        self.few_bytes = torch.float32.itemsize * weights.few_rows * weights.in_features

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        weights = self.weights
        if self.is_fast(x):
            product = torch.ops.minitransformer.row_product
            return product(self.filled(x), weights.stored, weights.scale, weights.bias)
        if isinstance(weights, Float32) and has_many_products(x, self.out_features):
            return multiply_many_rows(x, weights.stored, weights.bias)
        return weights(x)

    def is_fast(self, x: Float[Tensor, "*batch in"]) -> bool:
        """Whether the kernel multiplies rows of this kind and number."""
        # Unlike sizes, bytes that are asked for add no operations to a recording.
        return x.dtype == torch.float32 and x.nbytes <= self.few_bytes

    def filled(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch padded"]:
        """`x` as the kernel reads it: one row after another, with zeros up to whole blocks."""
        x = F.pad(x, (0, self.padding)) if self.padding else x
        return x if x.is_contiguous() else x.contiguous()


def project_rows(x: Float[Tensor, "*batch features"], *maps: nn.Module) -> Sequence[Float[Tensor, "*batch _"]]:
    """`project_each` by one call of the kernel, after which threads wait for each other, if it multiplies all maps."""
    kernels = [linear for linear in maps if isinstance(linear, KernelLinear) and not has_hooks(linear)]
    stored = [linear.weights for linear in kernels]
    scales = [part.scale for part in stored if part.scale is not None]
    biases = [part.bias for part in stored if part.bias is not None]
    kinds = {(part.stored.dtype, part.stored.shape[1:], part.bias is None) for part in stored}
    groups = {scale.shape[1:] for scale in scales}
    if len(kernels) < len(maps) or len(kinds) > 1 or len(groups) > 1 or not all(part.is_fast(x) for part in kernels):
        return project_each(x, *maps)
    products = torch.ops.minitransformer.row_products
    return products(kernels[0].filled(x), [part.stored for part in stored], scales, biases)


def _why_no_kernel(model: nn.Module, report: Callable[[str], None]) -> str | None:
    """Why the kernel is not used, as a clause that follows "as", or None if it is."""
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        return "ours is for CPUs"
    if any(weight.dtype != torch.float32 for weight in model.parameters() if weight.is_floating_point()):
        return "ours is for models in float32"
    if count_matrix_weights(model) < FEW_WEIGHTS:
        return "compiling another does not pay for so small a model"
    try:
        row_kernel.prepare(report)
    except row_kernel.CannotCompile as reason:
        return str(reason)
    return None


def count_matrix_weights(model: nn.Module) -> int:
    """Number of weights in all linear maps: multiplications for each token."""
    maps = [module for module in model.modules() if isinstance(module, nn.Linear | StoredWeights)]
    return sum(linear.in_features * linear.out_features for linear in maps)


def for_single_rows(model: M) -> M:
    """A copy of `model` in eval mode, with the same weights as constants, whose linear maps are fast for one row."""
    rows = copied(model, lambda name, module: RowLinear(module) if is_plain(module) else None)
    for module in list(rows.modules()):
        # A tensor that requires a gradient cannot be a constant of a recording.
        constants = {name: _constant(weight) for name, weight in module._parameters.items()}
        vars(module).update(_parameters=constants, training=False)  # faster than `nn.Module.__setattr__`
        if isinstance(module, MultiHeadAttention):
            _join_projections(module)
            if module.kernel is fastest_attention:
                module.kernel = attend_from_rows
        if getattr(module, "activation", None) is F.gelu:
            module.activation = gelu_by_columns  # type: ignore[assignment]
    return rows


def _join_projections(attention: MultiHeadAttention) -> None:
    maps = [attention.query, attention.key, attention.value]
    small = sum(linear.out_features * linear.in_features for linear in maps) <= MANY_WEIGHTS
    if small and all(isinstance(linear, RowLinear) for linear in maps):
        attention.project = RowProjection(maps)


def _constant(weight: Tensor | None) -> nn.Parameter | None:
    return None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)


class RowLinear(nn.Linear):
    """x Wᵀ + b, fast for a single row; the outputs of several maps one after another."""

    def __init__(self, *maps: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw weights
        self._weights, self._biases = [linear.weight for linear in maps], [linear.bias for linear in maps]
        weight, bias = _joined(self._weights), _joined(self._biases)
        assert weight is not None
        self.out_features, self.in_features = weight.shape
        # Measured on CPUs: a row times a wide matrix is up to 1.8 times as fast if the matrix is stored by columns, and
        # large matrices are faster still with a vector.
        if weight.device.type == "cpu" and weight.size(0) > weight.size(1):
            weight = weight.t().contiguous().t()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.transposed = weight.t()
        self.register_parameter("bias", _constant(bias))
        self.large = weight.numel() > MANY_WEIGHTS

    def refresh(self) -> None:
        """Copy the weights again, where they are copies: the model may have been trained since."""
        for whole, parts in ((self.weight, self._weights), (self.bias, self._biases)):
            if whole is not None and whole.data_ptr() != parts[0].data_ptr():
                for copy, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
                    copy.copy_(part)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.large and x.numel() == self.weight.size(1):
            product = torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        elif has_many_products(x, self.out_features):
            return multiply_many_rows(x, self.weight, self.bias)
        else:
            product = x @ self.transposed
        return product if self.bias is None else product + self.bias


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors one after another; one alone is not copied."""
    known = [part.detach() for part in parts if part is not None]
    return torch.cat(known) if len(known) > 1 else next(iter(known), None)


class RowProjection(nn.Module):
    """Queries, keys and values of `maps` by one product: for few features, the calls take most of the time."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.together, self.sizes = RowLinear(*maps), [linear.out_features for linear in maps]

    def forward(self, x: Float[Tensor, "*batch in"], *maps: nn.Module) -> Sequence[Float[Tensor, "*batch _"]]:
        """The outputs of the `maps` that this was made from, as by `project_each`."""
        return self.together(x).split(self.sizes, dim=-1)


def attend_from_rows(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`fastest_attention`, but by its equation for single queries of many heads: up to 1.3 times as fast (measured)."""
    single = q.device.type == "cpu" and q.size(-2) == 1 and mask is None
    by_hand = single and q.size(0) * q.size(1) >= MANY_HEADS
    kernel = scaled_dot_product_attention if by_hand and q.size(1) == k.size(1) else fastest_attention
    return kernel(q, k, v, mask=mask, **options)


def gelu_by_columns(x: Tensor) -> Tensor:
    """`F.gelu`, for few elements of float32 without oneDNN, which takes several times as long as torch (measured).

    torch uses oneDNN for row-major tensors, and its own kernel for column-major ones.
    """
    elements = x.nbytes // x.itemsize  # unlike `numel`, no operation of a recording
    if x.device.type == "cpu" and x.dtype == torch.float32 and elements <= FEW_ELEMENTS and elements % 2 == 0:
        return F.gelu(x.view(2, -1).t()).t().view_as(x) if x.is_contiguous() else F.gelu(x)
    return F.gelu(x)
