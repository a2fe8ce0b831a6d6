"""Every residual placement, with what it needs of a small model."""

from __future__ import annotations

from typing import Any

from minitransformer.architecture.residual import Residual

NEEDS: dict[str, dict[str, Any]] = {"mix": {"num_layers": 4, "num_decoder_layers": 4}}
"""Mix-LN has no Post-LN layer, and is refused, below four layers."""


def choosing(residual: str) -> dict[str, Any]:
    """Choices of a model that make it one with this placement, whatever its size was to be."""
    return {"residual": residual, **NEEDS.get(residual, {})}


EVERY_PLACEMENT = [choosing(name) for name in Residual.registry]
