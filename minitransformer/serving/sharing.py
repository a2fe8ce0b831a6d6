"""Weights that several models have in common, as adapters of one base, are in memory once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn


@torch.no_grad()
def share_equal_tensors(model: nn.Module, others: Iterable[nn.Module]) -> int:
    """Have the tensors of `model` that equal those of the same name in one of `others` use their memory.

    Returns how many bytes are free for it. A merged adapter keeps the matrices that it changes.
    """
    known = [dict(_tensors_of(other)) for other in others]
    freed: dict[int, int] = {}  # by place: tensors of one model may share theirs
    for name, tensor in _tensors_of(model):
        twins = (each[name] for each in known if name in each)
        twin = next((each for each in twins if _is_equal(tensor, each)), None)
        if twin is not None and twin.data_ptr() != tensor.data_ptr():
            freed[tensor.data_ptr()] = tensor.nbytes
            tensor.data = twin.data
    return sum(freed.values())


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _is_equal(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.device, one.shape, one.stride()) == (other.dtype, other.device, other.shape, other.stride())
    return alike and torch.equal(one, other)
