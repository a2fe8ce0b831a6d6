"""Ordered parallel work on threads, with a progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

AHEAD = 1 << 20
"""characters per thread that are processed ahead"""
T = TypeVar("T")
R = TypeVar("R")


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, size: Callable[[T], int] = lambda item: AHEAD
) -> Iterator[R]:
    """`map` on threads with bounded read-ahead, so that memory holds few items.

    The bound is on the total `size`, so that threads stay busy beside a large item.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[Future[R], int]] = deque()
        total = 0
        try:
            for item in items:
                ahead.append((pool.submit(function, item), size(item)))
                total += ahead[-1][1]
                while len(ahead) > workers + 1 and total > workers * AHEAD:
                    first, length = ahead.popleft()
                    total -= length
                    yield first.result()
            while ahead:
                yield ahead.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)


def progress_bar(description: str, total: int, progress: bool) -> Any:
    """A progress bar in bytes, on a terminal and with `progress`."""
    from tqdm import tqdm

    # disable=None: a bar on a terminal, nothing in a pipe.
    hidden = None if progress else True
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=hidden, leave=False)
