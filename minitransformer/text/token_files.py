"""Memory-mapped files of token ids: one long text, or a ragged array of texts."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minitransformer.errors import StorageError
from minitransformer.text.tokenizers import Tokenizer

Tokens = npt.NDArray[np.unsignedinteger[Any]]
OFFSET = np.dtype("<i8")
BLOCK = 1 << 22
"""tokens that are counted at a time"""


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest dtype for all ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def stored_dtype(name: Any, tokenizer: Tokenizer) -> np.dtype[Any]:
    """The dtype of `tokenizer`; raises `ValueError` if the stored name differs."""
    dtype = dtype_of(tokenizer)
    if name != dtype.name:
        raise ValueError(f"tokens are {name!r}, not {dtype.name}")
    return dtype


def mapped(path: Path, dtype: np.dtype[Any], count: int) -> Any:
    """The `count` numbers in the file at `path`, memory-mapped; raises `ValueError` for another count."""
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path} does not hold {count} numbers")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


class TokenSource(Protocol):
    """Token ids by position: an array, or files that are read where they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any, /) -> Any: ...


class StoredTokens(ABC):
    """Token ids on disk that are not mapped into memory, but read where they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, first: int, last: int) -> Tokens:
        """The ids from `first` to before `last`."""

    def __getitem__(self, places: slice | npt.NDArray[np.int64]) -> Tokens:
        """The ids at a slice, or at places [rows, length] of which each row is near together."""
        if isinstance(places, slice):
            first, last, _ = places.indices(len(self))
            return self.read(first, max(first, last))
        lowest = places.min(1).tolist()
        rows = zip(places, lowest, places.max(1).tolist(), strict=True)
        return np.stack([self.read(low, high + 1)[row - low] for row, low, high in rows])


@dataclass(frozen=True)
class TokenFile(StoredTokens):
    """The ids from `first` to before `last` in the file at `path`, as it was when `state` was noted.

    A file that has vanished or changed since is a `StorageError` in place of a bus error, or of other ids.
    """

    path: Path
    dtype: np.dtype[Any]
    first: int
    last: int
    state: tuple[int, int]

    @classmethod
    def open(cls, path: Path, dtype: np.dtype[Any]) -> TokenFile:
        """All of the ids at `path`; raises `StorageError` for a missing or truncated file."""
        with reading_shard(path):
            state = _state(path.stat())
        if state[0] % dtype.itemsize:
            raise StorageError(
                f"shard {path} has {state[0]:,} bytes, not a multiple of the {dtype.itemsize} of each token: "
                "it is truncated: copy it again"
            )
        return cls(path, dtype, 0, state[0] // dtype.itemsize, state)

    def part(self, first: int, last: int) -> TokenFile:
        """The ids from `first` to before `last` of these."""
        return replace(self, first=self.first + first, last=self.first + last)

    def __len__(self) -> int:
        return self.last - self.first

    def read(self, first: int, last: int) -> Tokens:
        with reading_shard(self.path), self.path.open("rb") as file:
            if _state(os.fstat(file.fileno())) != self.state:
                raise StorageError(f"shard {self.path} has changed while it was in use: restore it, and resume")
            file.seek((self.first + first) * self.dtype.itemsize)
            return np.frombuffer(file.read((last - first) * self.dtype.itemsize), self.dtype)


@contextmanager
def reading_shard(path: Path) -> Iterator[None]:
    """Turn an `OSError` while reading the shard at `path` into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"shard {path} cannot be read ({error.strerror}): restore it, and start again") from None


def _state(entry: os.stat_result) -> tuple[int, int]:
    return entry.st_size, entry.st_mtime_ns


@dataclass(frozen=True)
class JoinedTokens(StoredTokens):
    """The ids of several files, one after the other."""

    parts: tuple[TokenFile, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, first: int, last: int) -> Tokens:
        return np.concatenate([np.empty(0, np.uint16), *(part[:] for part in self.part(first, last).parts)])

    def part(self, first: int, last: int) -> JoinedTokens:
        """The ids from `first` to before `last` of these."""
        found = []
        for part, start in zip(self.parts, self._ends, strict=False):
            low, high = max(first - start, 0), min(last - start, len(part))
            if low < high:
                found.append(part.part(low, high))
        return JoinedTokens(tuple(found))


def count_ids(tokens: TokenSource, vocab_size: int) -> npt.NDArray[np.int64]:
    """[vocab_size] how often each id is in `tokens`, of which a block at a time is in memory."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), BLOCK):
        counts += np.bincount(tokens[start : start + BLOCK], minlength=vocab_size)
    return counts


def count_bytes(tokenizer: Tokenizer, tokens: TokenSource) -> int:
    """Number of bytes of text in `tokens` [tokens]."""
    return int(np.array([len(piece) for piece in tokenizer.pieces]) @ count_ids(tokens, tokenizer.vocab_size))


@dataclass(frozen=True, eq=False)
class Ragged:
    """A ragged array of texts: text i is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: Tokens
    """[tokens]"""
    offsets: npt.NDArray[np.int64]
    """[texts + 1]"""

    @classmethod
    def join(cls, texts: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any]) -> Ragged:
        """Concatenate `texts`, each [tokens]."""
        kept = [np.empty(0, dtype), *(text.astype(dtype) for text in texts)]
        return cls(np.concatenate(kept), np.cumsum([len(text) for text in kept], dtype=np.int64))

    @classmethod
    def load(cls, folder: Path, name: str, meta: dict[str, Any], tokenizer: Tokenizer) -> Ragged:
        """Load what the `RaggedWriter` `name` wrote to `folder`; `meta` is the result of its `finish`."""
        tokens = mapped(folder / f"{name}.bin", stored_dtype(meta["dtype"], tokenizer), meta["tokens"])
        return cls(tokens, mapped(folder / f"{name}-offsets.bin", OFFSET, meta["texts"] + 1))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tokens:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[texts]"""
        return np.diff(self.offsets)


class RaggedWriter:
    """Writes texts to one file, and finally their offsets to another."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, stack: ExitStack) -> None:
        self.name = name
        self.tokens = stack.enter_context((folder / f"{name}.bin").open("wb"))
        self.offsets = folder / f"{name}-offsets.bin"
        self.dtype, self.ends = dtype_of(tokenizer), array("q", [0])

    def add(self, tokens: Tokens) -> None:
        self.tokens.write(tokens.astype(self.dtype).data)
        self.ends.append(self.ends[-1] + len(tokens))

    def finish(self) -> dict[str, Any]:
        self.offsets.write_bytes(np.array(self.ends, OFFSET).tobytes())
        return {"dtype": self.dtype.name, "texts": len(self.ends) - 1, "tokens": self.ends[-1]}


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Sources and targets, without start token and without the last token of each."""

    sources: Ragged
    targets: Ragged

    def __len__(self) -> int:
        return len(self.sources)
