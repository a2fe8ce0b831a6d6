"""Recorded decode steps: faster than `plain_steps`, with the same results."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.batch import DecodeStep, MakeStep, decode_rows
from minitransformer.generation.fast.recording import StepFunction, has_fixed_shapes, recorded, slots_visible
from minitransformer.generation.fast.rows import for_single_rows
from minitransformer.models.decoder import DecoderLM


def recorded_steps(model: DecoderLM) -> MakeStep:
    """Recorded steps of a copy of `model` that is fast for few rows."""
    return partial(recorded_step, model, for_single_rows(model))


def recorded_step(model: DecoderLM, fast: DecoderLM, cache: KVCache, count: int, full: bool) -> DecodeStep:
    """A step of `fast`, which is `model` with constant weights; `count` and `full` are constants of the recording."""
    device = next(model.parameters()).device
    fixed = has_fixed_shapes(device)
    # Where shapes are fixed, more slots are visible than hold tokens.
    step = recorded(partial(decode_rows, fast, cache, count, full and not fixed), model)
    return _with_fewer_shapes(step, cache, device) if fixed else step


def _with_fewer_shapes(step: StepFunction, cache: KVCache, device: torch.device) -> StepFunction:
    """`step` with its third argument, as long as the visible slots, rounded up to one of few lengths."""
    slots = torch.arange(cache.max_length, device=device)

    def rounded(tokens: Tensor, new: Tensor, visible: Tensor, *others: Tensor) -> Tensor:
        return step(tokens, new, slots[: slots_visible(visible.size(0), cache.max_length, True)], *others)

    return rounded
