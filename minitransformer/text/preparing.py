"""What all ways to prepare text share: samples, threads, progress, and folders that are made once."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import locked, whole_folder
from minitransformer.text.corpora import Corpus, Signature
from minitransformer.text.tokenizers import Tokenizer

SPLITS = ("train", "validation")
# A sample of the corpus is many stretches of this many characters, evenly spread.
STRETCH = 1 << 14
AHEAD = 1 << 20
"""characters for each thread, of what is begun before it is asked for"""
Tokens = npt.NDArray[np.unsignedinteger[Any]]
T = TypeVar("T")
R = TypeVar("R")


def hash_of(content: Any) -> str:
    """sha256 of the JSON of `content`."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def progress_bar(description: str, total: int, progress: bool) -> Any:
    """A bar that counts bytes, on a terminal and if `progress` is asked for."""
    from tqdm import tqdm

    # disable=None: a bar on a terminal, nothing in a pipe.
    hidden = None if progress else True
    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=hidden, leave=False)


def check_unchanged(corpus: Corpus, signature: Signature) -> None:
    """Raises `UserError` if the files of `corpus` have another signature by now."""
    if corpus.signature() != signature:
        raise UserError(f"{corpus.name} changed while it was read: try again when nothing writes to it")


def sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """About `share` of the characters, in stretches that are evenly spread; the same ones every time."""
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), STRETCH):
            stretch = text[start : start + STRETCH]
            seen += len(stretch)
            if taken + len(stretch) <= seen * share:
                taken += len(stretch)
                yield stretch


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


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds all ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def stored_dtype(name: Any, tokenizer: Tokenizer) -> np.dtype[Any]:
    """That of `tokenizer`; raises `ValueError` if the note of a folder has the name of another one."""
    dtype = dtype_of(tokenizer)
    if name != dtype.name:
        raise ValueError(f"tokens are {name!r}, not {dtype.name}")
    return dtype


def mapped(path: Path, dtype: np.dtype[Any], count: int) -> Tokens:
    """The `count` tokens in the file at `path`, read when they are asked for; raises `ValueError` for another count."""
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path} does not hold {count} tokens")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


def made(folder: Path, build: Callable[[Path], None], opened: Callable[[Path], T | None]) -> T:
    """What `opened` finds in `folder`, built by one process while any other that wants the same waits."""
    if (content := opened(folder)) is not None:
        return content
    with locked(folder):
        content = opened(folder)
        if content is None:
            with whole_folder(folder) as partial:
                build(partial)
            content = opened(folder)
    assert content is not None, f"{folder} was built and cannot be opened"
    return content
