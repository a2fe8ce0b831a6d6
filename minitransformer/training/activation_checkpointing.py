"""Activation checkpointing: the backward pass recomputes what is inside a block, instead of keeping it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from minitransformer.architecture.block import Stack
from minitransformer.training.precision import Precision


def checkpoint_activations(model: nn.Module, precision: Precision, *, compiled: bool) -> None:
    """Keep only the stream between the blocks of `model`; its gradients are the same, bit for bit.

    In a `compiled` model, within rounding. Chen et al. 2016 (Sublinear Memory Cost, arXiv 1604.06174), section 4, with
    a segment for each block.
    """
    from torch.utils.checkpoint import checkpoint

    def in_precision() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), precision.autocast()

    # torch restores autocast itself, but not what else a precision does; a compiled graph has it inside.
    contexts: dict[str, Any] = {} if compiled else {"context_fn": in_precision}
    for module in model.modules():
        if isinstance(module, Stack):
            module.run_block = partial(checkpoint, use_reentrant=False, **contexts)
