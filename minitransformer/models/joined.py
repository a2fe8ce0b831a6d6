"""Several linear maps of one input as a single matrix product, which uses more cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.attention import project_each


def project_together(x: Float[Tensor, "*batch features"], *maps: nn.Linear) -> Sequence[Float[Tensor, "*batch _"]]:
    """`project_each` as one product in training, where there are enough rows to outweigh concatenating the weights.

    Modules that are not plain `nn.Linear`, or that have hooks, are called one by one.
    """
    if not torch.is_grad_enabled() or not all(is_plain(linear) for linear in maps):
        return project_each(x, *maps)
    weights: list[Tensor] = [linear.weight for linear in maps]
    biases: list[Tensor] = [linear.bias for linear in maps if linear.bias is not None]
    assert len(biases) in (0, len(maps))
    together = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return together.split([len(weight) for weight in weights], dim=-1)


def is_plain(linear: nn.Module) -> bool:
    """Whether `linear` computes what `nn.Linear` does, and has no hooks."""
    return isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward and not has_hooks(linear)


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` itself has forward or backward hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
