"""Every residual placement, with what it needs of a small model."""

from __future__ import annotations

from typing import Any

from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig

LATE = 10**6
"""updates after which nothing depends on the training step any more"""
OURS = [name for name, placement in Residual.registry.items() if placement.__module__.startswith("minitransformer.")]
"""placements of the package, without those of plugins"""


def choosing(residual: str) -> dict[str, Any]:
    """Choices of a model that make it one with this placement, whatever its size was to be."""
    try:
        ModelConfig(residual=residual, num_layers=1)
    except UserError:  # Mix-LN has no Post-LN layer below four
        return {"residual": residual, "num_layers": 4, "num_decoder_layers": 4}
    return {"residual": residual}


EVERY_PLACEMENT = [choosing(name) for name in Residual.registry]
