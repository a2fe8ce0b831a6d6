"""Copies of tokens to the host, during which the device goes on to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def stream_to_host(tensors: Iterable[Tensor], asynchronous: bool) -> Iterator[list[int]]:
    """Their contents; those of an asynchronous device after the next one was launched, so that it never idles."""
    pending: Callable[[], list[int]] | None = None
    for tensor in tensors:
        if not asynchronous:
            yield tensor.tolist()
            continue
        copy = start_copy(tensor)
        if pending:
            yield pending()
        pending = copy
    if pending:
        yield pending()


def start_copy(tensor: Tensor) -> Callable[[], list[int]]:
    """Start to copy `tensor` to the host; returns a function that waits for the copy and returns the contents."""
    if not tensor.is_cuda:
        return tensor.tolist
    copy, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return wait
