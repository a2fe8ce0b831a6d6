"""Recorded decode steps: faster than `plain_steps`, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.batch import DecodeStep, MakeStep, decode_rows, plain_step
from minitransformer.generation.fast.recording import (
    MOST,
    Recorded,
    has_fixed_shapes,
    products_of,
    slots_visible,
)
from minitransformer.generation.fast.rows import RowLinear, for_single_rows
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.joined import has_hooks


def recorded_steps(model: DecoderLM) -> MakeStep:
    """Recorded steps of a copy of `model` that is fast for few rows, kept for the next text of the same model."""
    kept = KEPT.pop(model, None)
    if any(map(has_hooks, model.modules())):  # which a replay would not run
        return partial(plain_step, for_single_rows(model))
    if has_fixed_shapes(next(model.parameters()).device):
        return partial(captured_step, for_single_rows(model), products_of(model))
    if kept is not None and kept.are_of(model):
        kept.refresh()
    else:
        kept = KeptSteps(model)
    KEPT[model] = kept
    return kept


class KeptSteps:
    """Recorded steps that take the tensors of a cache as arguments, and so serve one text after another.

    They compute with the weights of `model` as they are, or as they were at the last `refresh` where those are copied.
    Once a module, a tensor or another attribute of `model` is replaced, they no longer are of it, nor under another
    autocast, whose conversions are recorded.
    """

    def __init__(self, model: DecoderLM) -> None:
        self._parts, self._places, self._autocast = _parts(model), _places(model), _autocast(model)
        self._fast, self._products = for_single_rows(model), products_of(model)
        self._copies = [module for module in self._fast.modules() if isinstance(module, RowLinear)]
        self._recorded: dict[tuple[int, bool, int], Recorded] = {}

    def are_of(self, model: DecoderLM) -> bool:
        """Whether `model` is what it was, but for the contents of its tensors."""
        parts = _parts(model)
        same = len(parts) == len(self._parts) and all(map(is_, parts, self._parts))
        return same and _places(model) == self._places and _autocast(model) == self._autocast

    @torch.inference_mode()
    def refresh(self) -> None:
        """Copy the weights again that are copied."""
        for linear in self._copies:
            linear.refresh()

    def __call__(self, cache: KVCache, count: int, full: bool) -> DecodeStep:
        """A step with this cache, which has been filled; arguments as in `MakeStep`."""
        kind = count, full, len(cache.tensors()[0])
        if kind not in self._recorded:
            if len(self._recorded) == MOST:  # each takes megabytes, and stays as long as the model
                self._recorded.clear()
            self._recorded[kind] = Recorded(partial(decode_rows_of, self._fast, count, full), self._products)
        step = self._recorded[kind]

        def with_cache(*inputs: Tensor) -> Tensor:
            tensors = cache.tensors()
            return step(*inputs, *(tensors[:-1] if full else tensors))  # positions are not read if it is full

        return with_cache


def decode_rows_of(fast: DecoderLM, count: int, full: bool, *tensors: Tensor) -> Tensor:
    """`decode_rows`, with the tensors of the cache after those of the step."""
    inputs, held = tensors[:4], tensors[4:]
    cache = fast.new_cache(held[0].size(2))
    cache.adopt(held)
    return decode_rows(fast, cache, count, full, *inputs)


KEPT: WeakKeyDictionary[DecoderLM, KeptSteps] = WeakKeyDictionary()
"""by model, and freed with it"""


def _parts(model: nn.Module) -> list[object]:
    """The modules of a model, as far as they are told apart by identity: classes and attributes."""
    parts: list[object] = []
    for module in model.modules():
        parts.append(type(module))
        for value in vars(module).values():
            parts += value.values() if isinstance(value, dict) else [value]
    return parts


def _places(model: nn.Module) -> list[int]:
    """Where the contents of tensors are, which `tensor.data = …` changes."""
    return [tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers())]


def _autocast(model: nn.Module) -> torch.dtype | None:
    """The type that autocast converts to where the model is, if it is enabled."""
    kind = next(model.parameters()).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def captured_step(fast: DecoderLM, products: Callable[..., int], cache: KVCache, count: int, full: bool) -> DecodeStep:
    """A step of `fast` with this cache; `count` is a constant of the recording."""
    # More slots are visible than hold tokens.
    step = Recorded(partial(decode_rows, fast, cache, count, False), products, fixed=True)
    slots = torch.arange(cache.max_length, device=next(fast.parameters()).device)

    def rounded(tokens: Tensor, new: Tensor, visible: Tensor, *others: Tensor) -> Tensor:
        return step(tokens, new, slots[: slots_visible(visible.size(0), cache.max_length, True)], *others)

    return rounded
