"""Work on several threads, in order and with a progress bar."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

AHEAD = 1 << 20
"""characters for each thread, of what is begun before it is asked for"""
T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, size: Callable[[T], int] = lambda item: AHEAD
) -> Iterator[R]:
    """`map` on threads that runs only a little ahead, so that memory holds a few items however many there are.

    Small ones are more, as `size` tells, so that no thread waits for the others while one has a large item.
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
    """A bar that counts bytes, on a terminal and if `progress` is asked for."""
    from tqdm import tqdm

    # disable=None: a bar on a terminal, nothing in a pipe.
    hidden = None if progress else True
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=hidden, leave=False)
