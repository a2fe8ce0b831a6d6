"""Several linear maps of one input as a single matrix product, which uses more cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.attention import project_each


def project_together(x: Float[Tensor, "*batch features"], *maps: nn.Module) -> Sequence[Float[Tensor, "*batch _"]]:
    """`project_each` as one product in training, where there are enough rows to outweigh concatenating the weights.

    Modules that are not plain `nn.Linear`, or that have hooks, are called one by one.
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
    """Whether `module` computes what `nn.Linear` does, and has no hooks."""
    return type(module).forward is nn.Linear.forward and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` itself has forward or backward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
