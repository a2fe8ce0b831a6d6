"""Several linear maps of one input by a single product, which small maps do not keep all cores busy without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.attention import project_each


def project_together(x: Float[Tensor, "*batch features"], *maps: nn.Module) -> Sequence[Float[Tensor, "*batch _"]]:
    """`project_each` by one product in training, where a step has so many rows that joining the weights pays.

    Maps that do something else, or that have hooks, are called one by one.
    """
    linears = [linear for linear in maps if is_plain(linear)]
    if not torch.is_grad_enabled() or len(linears) < len(maps):
        return project_each(x, *maps)
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(maps))
    together = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return together.split([len(weight) for weight in weights], dim=-1)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it does what `nn.Linear` does, and has no hooks."""
    return type(module).forward is nn.Linear.forward and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether this very module has hooks, which only a call of it runs."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
