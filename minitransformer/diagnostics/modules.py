"""The stacks, layers and sublayers of a model by name."""

from __future__ import annotations

from torch import nn

from minitransformer.architecture.block import Block, Branch, Stack


def stacks_of(model: nn.Module) -> dict[str, Stack]:
    """The stacks of `model` by name: "stack", or "encoder" and "decoder"."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Stack)}


def layers_of(model: nn.Module) -> dict[str, Block]:
    """The blocks of `model` by location, such as "stack.0"."""
    return {
        f"{name}.{layer}": block  # type: ignore[misc]
        for name, stack in stacks_of(model).items()
        for layer, block in enumerate(stack.blocks)
    }


def sublayers_of(model: nn.Module) -> dict[str, Branch]:
    """The sublayers of `model` by location, such as "stack.0.attention"."""
    return {f"{place}.{branch.name}": branch for place, block in layers_of(model).items() for branch in block.branches}
