"""Prefetching of the next step's batches while the device computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

BatchesOf = Callable[[int], Sequence[Any]]


def prefetched(batches_of: BatchesOf, device: torch.device, share: Callable[[int], range]) -> BatchesOf:
    """`batches_of` with prefetching if training runs on an accelerator; in pinned memory for CUDA.

    Of a batch with n rows, this process uses `share(n)`. On a CPU, prefetching would only compete with the current
    step.
    """
    if device.type == "cpu":
        return batches_of

    def ready(step: int) -> Sequence[Any]:
        batches = [batch.ready(share(batch.num_rows)) for batch in batches_of(step)]
        return [batch.pinned() for batch in batches] if device.type == "cuda" else batches

    return Ahead(ready)


class Ahead:
    """`batches_of`, with a thread that prepares the step after each requested one."""

    def __init__(self, batches_of: BatchesOf) -> None:
        self.batches_of = batches_of
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[int, Future[Sequence[Any]]] = {}

    def __call__(self, step: int) -> Sequence[Any]:
        begun = self._begun.pop(step, None)
        batches = self.batches_of(step) if begun is None else begun.result()
        self._begun = {step + 1: self._thread.submit(self.batches_of, step + 1)}
        return batches
