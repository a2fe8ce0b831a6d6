"""The batches of the next step, made while a device works on this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

BatchesOf = Callable[[int], Sequence[Any]]


def prefetched(batches_of: BatchesOf, device: torch.device) -> BatchesOf:
    """`batches_of`, ahead of time where another processor than ours trains; for CUDA, where it can fetch them itself.

    On a CPU, whoever makes the next batches would only take the time of this step.
    """
    if device.type == "cpu":
        return batches_of
    if device.type == "cuda":
        return Ahead(lambda step: [pinned(batch) for batch in batches_of(step)])
    return Ahead(batches_of)


class Ahead:
    """`batches_of`, which a thread asks for the step after each that is asked for."""

    def __init__(self, batches_of: BatchesOf) -> None:
        self.batches_of = batches_of
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[int, Future[Sequence[Any]]] = {}

    def __call__(self, step: int) -> Sequence[Any]:
        begun = self._begun.pop(step, None)
        batches = self.batches_of(step) if begun is None else begun.result()
        self._begun = {step + 1: self._thread.submit(self.batches_of, step + 1)}
        return batches


def pinned(batch: Any) -> Any:
    """`batch`, whose tensors a GPU can copy while both sides go on; what it lacks, it lacks as before."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: value.pin_memory() for name, value in tensors.items() if isinstance(value, Tensor)})
