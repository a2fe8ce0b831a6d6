"""Steps of a batch that are recorded: what `plain_steps` does, faster."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.batch import MakeStep, RowStep, decode_rows
from minitransformer.generation.fast.recording import has_fixed_shapes, recorded, slots_visible
from minitransformer.generation.fast.rows import for_single_rows
from minitransformer.models.decoder import DecoderLM


def recorded_steps(model: DecoderLM) -> MakeStep:
    """Steps of a copy of `model` that is fast for few rows."""
    return partial(recorded_step, model, for_single_rows(model))


def recorded_step(model: DecoderLM, fast: DecoderLM, cache: KVCache, full: bool) -> RowStep:
    """A step of `fast`, which is `model` made of constants."""
    device = next(model.parameters()).device
    if not has_fixed_shapes(device):
        return recorded(partial(decode_rows, fast, cache, full), model)
    # More slots are visible than hold tokens.
    step = recorded(partial(decode_rows, fast, cache, False), model)
    slots = torch.arange(cache.max_length, device=device)

    def rounded(tokens: Tensor, slot: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        return step(tokens, slot, slots[: slots_visible(visible.size(0), cache.max_length, True)], positions)

    return rounded
