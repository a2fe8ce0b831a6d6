"""What laws do so that they hold for variants that depend on the training step, too."""

from __future__ import annotations

from typing import Any

from torch import nn

LATE = 10**6
"""updates after which nothing depends on the training step any more"""


def late(model: nn.Module) -> Any:
    """`model` as it is long after its training began, for laws of the equation that it has then."""
    for module in model.modules():
        if hasattr(module, "begin_step"):
            module.begin_step(LATE)
    return model
