"""Every residual placement, with what it needs of a small model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from tests.plugins_for_tests import late

OURS = [name for name, placement in Residual.registry.items() if placement.__module__.startswith("minitransformer.")]
"""placements of the package, without those of plugins"""


def choosing(residual: str) -> dict[str, Any]:
    """Choices of a model that make it one with this placement, whatever its size was to be."""
    try:
        ModelConfig(residual=residual, num_layers=1)
    except UserError:  # Mix-LN has no Post-LN layer below four
        return {"residual": residual, "num_layers": 4, "num_decoder_layers": 4}
    return {"residual": residual}


@torch.no_grad()
def nudged(model: nn.Module) -> Any:
    """`model`, late in its training, with noise on every weight: none is 0 where its gradient or another would be."""
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return late(model)


EVERY_PLACEMENT = [choosing(name) for name in Residual.registry]
