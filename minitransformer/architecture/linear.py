"""The linear maps of a transformer that play a role of their own."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ScoreProjection(nn.Linear):
    """A linear map that only says where to look, such as that of queries and keys; initialisations ask for it."""


class OutputProjection(nn.Linear):
    """The last linear map of a sublayer, whose output is added to the residual stream; initialisations ask for it."""


def applied_together(x: Float[Tensor, "*batch features"], *maps: nn.Module) -> Sequence[Float[Tensor, "*batch _"]]:
    """[map(x) for map in maps] by one matrix product, as small ones do not keep all cores busy.

    Maps that do something else, or that have hooks, are called one by one.
    """
    linears = [linear for linear in maps if is_plain(linear)]
    if len(linears) < len(maps):
        return [module(x) for module in maps]
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(maps))
    together = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return together.split([len(weight) for weight in weights], dim=-1)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it does what `nn.Linear` does, and has no hooks."""
    return type(module).forward is nn.Linear.forward and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether this very module has hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
