"""The same model with less to do for each token.

For one token, what `nn.Module` does around a `forward` (hooks, the search for attributes) takes as long as the
arithmetic in it. `lean` makes a copy without that. Three kinds of modules are first replaced by ones that give the same
numbers with fewer or faster steps; every other module, whatever variant it is, keeps its own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention, identity
from minitransformer.architecture.cache import LayerCache

M = TypeVar("M", bound=nn.Module)


def lean(module: M) -> M:
    """A copy of `module` in eval mode; made when its weights are final, for some of them are copied too.

    A module with hooks stays itself, with all that is in it.
    """
    assert not module.training
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    replace = REPLACEMENTS.get(type(module).forward)
    source: Any = module if replace is None else replace(module).eval()
    children = {name: None if child is None else lean(child) for name, child in source._modules.items()}
    kind: Any = type(source)
    copy = object.__new__(_plain_call(kind))
    # As plain attributes they are found at once; `nn.Module` looks for them in three dictionaries, by a slow path.
    copy.__dict__ |= {**source.__dict__, **source._parameters, **source._buffers, **children, "_modules": children}
    return copy


@cache
def _plain_call(kind: Any) -> Any:
    """The class `kind`, whose instances call `forward` and nothing else."""
    return type(kind.__name__, (kind,), {"__call__": kind.forward})


class Product(nn.Module):
    """x Wᵀ + b, fast for a single row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        # Measured on CPUs: a row times a wide matrix is up to 1.8 times as fast if the matrix is stored by columns, and
        # large matrices are faster still with a vector.
        if weight.device.type == "cpu" and weight.size(0) > weight.size(1):
            weight = weight.t().contiguous().t()
        self.weight, self.transposed, self.bias = weight, weight.t(), linear.bias
        self.large = weight.numel() > 1 << 17

    def forward(self, x: Tensor) -> Tensor:
        if self.large and x.numel() == self.weight.size(1):
            product = torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        else:
            product = x @ self.transposed
        return product if self.bias is None else product + self.bias


class SelfAttention(nn.Module):
    """`MultiHeadAttention` from x to itself, whose queries, keys and values come from one product."""

    def __init__(self, full: MultiHeadAttention) -> None:
        super().__init__()
        self.project = _joined(full.query, full.key, full.value)
        self.query_norm, self.key_norm, self.output = full.query_norm, full.key_norm, full.output
        self.head_dim, self.scale, self.kernel = full.head_dim, full.scale, full.kernel
        self.heads = [linear.out_features // full.head_dim for linear in (full.query, full.key, full.value)]
        self.normalised = not isinstance(full.query_norm, nn.Identity)

    def forward(self, x: Tensor, *, view: AttentionView, cache: LayerCache | None = None) -> Tensor:
        # `view` and `split_with_sizes` go straight to their kernels; `unflatten` and `split` pass through Python first.
        heads = self.project(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # batch, heads, length, head_dim
        q, k, v = heads.split_with_sizes(self.heads, dim=1)
        if self.normalised:
            q, k = view.rotate(self.query_norm(q)), view.rotate(self.key_norm(k))
        elif view.rotate is not identity:
            q, k = view.rotate(heads[:, : -self.heads[2]]).split_with_sizes(
                self.heads[:2], dim=1
            )  # at once: half the steps
        if cache is not None:
            k, v = cache.append(k, v)
        attended = self.kernel(q, k, v, causal=view.causal, mask=view.mask, bias=view.bias, scale=self.scale)
        return self.output(attended.transpose(1, 2).flatten(2))  # batch, query, heads · head_dim


def _joined(*maps: nn.Linear) -> nn.Linear:
    """One linear map whose outputs are those of `maps`, one after the other."""
    outputs = sum(linear.out_features for linear in maps)
    joined = nn.Linear(maps[0].in_features, outputs, bias=maps[0].bias is not None, device="meta")
    for name in dict(joined.named_parameters()):
        weights = torch.cat([getattr(linear, name).detach() for linear in maps])
        setattr(joined, name, nn.Parameter(weights, requires_grad=False))
    return joined


REPLACEMENTS: dict[Callable[..., Any], Callable[[Any], nn.Module]] = {
    nn.Dropout.forward: lambda dropout: nn.Identity(),
    nn.Linear.forward: Product,
    MultiHeadAttention.forward: SelfAttention,
}
