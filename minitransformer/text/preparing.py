"""What all ways to prepare text share: samples, threads, progress, and folders that are made once."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import locked, sealed, sha256, unsealed, whole_folder, write_text
from minitransformer.records import read_json, whole_record
from minitransformer.text.corpora import Corpus, Signature
from minitransformer.text.tokenizers import Tokenizer

SPLITS = ("train", "validation")
# A sample of the corpus is many stretches of this many characters, evenly spread.
STRETCH = 1 << 14
SUMS = "sha256.json"
"""in a prepared folder: the digest of each of its files"""
BLOCK = 1 << 26
"""bytes that one core hashes at a time"""
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


def digest_of(path: Path) -> str:
    """The SHA-256 of the SHA-256 of each block of the file at `path`, so that every core can take one."""
    size = path.stat().st_size

    def block(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    starts = range(0, size, BLOCK)
    return hashlib.sha256(b"".join(in_order(block, starts, min(cores(), len(starts)) or 1))).hexdigest()


def write_sums(folder: Path) -> None:
    """Write down the digests of all files in `folder`."""
    write_text(folder / SUMS, json.dumps(sealed({path.name: digest_of(path) for path in sorted(folder.iterdir())})))


def is_damaged(folder: Path) -> bool:
    """Whether a file of the prepared `folder` is not what was written; the oldest folders do not know, and are not."""
    try:
        if not (folder / SUMS).exists():
            return False
        sums = unsealed(read_json(folder / SUMS, "make it anew"))
        return any(digest_of(folder / name) != digest for name, digest in sums.items())
    except (OSError, ValueError, UserError):
        return True


def made(folder: Path, build: Callable[[Path], None], opened: Callable[[Path], T | None]) -> T:
    """What `opened` finds in `folder`, built by one process while any other that wants the same waits.

    A folder with a file that is not what was written is built again.
    """

    def found() -> T | None:
        return None if is_damaged(folder) else opened(folder)

    if (content := found()) is not None:
        return content
    with locked(folder):
        content = found()
        if content is None:
            with whole_folder(folder) as partial:
                build(partial)
                write_sums(partial)
            content = opened(folder)
    assert content is not None, f"{folder} was built and cannot be opened"
    return content


def kept_tokenizer(path: Path, fit: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in the file at `path`, unless it is not what was written; fitted now if there is none."""
    sums = path.with_suffix(".sha256")
    with locked(path):
        with suppress(UserError, OSError):
            if not sums.exists() or sums.read_text() == sha256(path):
                return Tokenizer.load(path)
        tokenizer = fit()
        tokenizer.save(path)
        write_text(sums, sha256(path))
    return tokenizer


def noted(path: Path, kind: type[T], find: Callable[[], T]) -> T:
    """The `kind` of dataclass in the file at `path`, unless it is not what was written; found now if there is none."""
    with suppress(UserError, ValueError):
        return whole_record(kind, unsealed(read_json(path, "make it anew")), "a text", str(path))
    content = find()
    write_text(path, json.dumps(sealed(vars(content))))
    return content
