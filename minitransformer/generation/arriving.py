"""Numbers on their way from a device, which goes on to work meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def on_host(tensors: Iterable[Tensor], asynchronous: bool) -> Iterator[list[int]]:
    """Their numbers. Those of an asynchronous device are read when it has the next one to work on, and never idles."""
    before: Callable[[], list[int]] | None = None
    for tensor in tensors:
        if not asynchronous:
            yield tensor.tolist()
            continue
        arriving = on_its_way(tensor)
        if before:
            yield before()
        before = arriving
    if before:
        yield before()


def on_its_way(tensor: Tensor) -> Callable[[], list[int]]:
    """Begins to copy what `tensor` will hold; waits for that alone when called."""
    if not tensor.is_cuda:
        return tensor.tolist
    numbers, arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return numbers.tolist()

    return wait
