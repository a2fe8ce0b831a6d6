"""The linear maps of a transformer that play a role of their own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ScoreProjection(nn.Linear):
    """A linear map that only says where to look, such as that of queries and keys; initialisations ask for it."""


class OutputProjection(nn.Linear):
    """The last linear map of a sublayer, whose output is added to the residual stream; initialisations ask for it."""


def applied_together(x: Float[Tensor, "*batch features"], *maps: nn.Linear) -> Sequence[Float[Tensor, "*batch _"]]:
    """[map(x) for map in maps] by one matrix product, as small ones do not keep all cores busy.

    Maps that do something else, or that somebody listens to, are called one by one.
    """
    if not all(type(map).forward is nn.Linear.forward and not map._forward_hooks for map in maps):
        return [map(x) for map in maps]
    biases = [map.bias for map in maps if map.bias is not None]
    assert len(biases) in (0, len(maps))
    together = F.linear(x, torch.cat([map.weight for map in maps]), torch.cat(biases) if biases else None)
    return together.split([map.out_features for map in maps], dim=-1)
