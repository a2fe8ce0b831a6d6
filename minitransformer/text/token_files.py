"""Token ids in files that are mapped into memory: one long text, or texts of any length one after the other."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.text.tokenizers import Tokenizer

Tokens = npt.NDArray[np.unsignedinteger[Any]]
OFFSET = np.dtype("<i8")


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds all ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def stored_dtype(name: Any, tokenizer: Tokenizer) -> np.dtype[Any]:
    """That of `tokenizer`; raises `ValueError` if the note of a folder has the name of another one."""
    dtype = dtype_of(tokenizer)
    if name != dtype.name:
        raise ValueError(f"tokens are {name!r}, not {dtype.name}")
    return dtype


def mapped(path: Path, dtype: np.dtype[Any], count: int) -> Any:
    """The `count` numbers in the file at `path`, read when they are asked for; `ValueError` for another count."""
    if path.stat().st_size != count * dtype.itemsize:
        raise ValueError(f"{path} does not hold {count} numbers")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


def count_bytes(tokenizer: Tokenizer, tokens: Tokens) -> int:
    """The bytes of text that `tokens` [tokens] stand for."""
    sizes = np.array([len(piece) for piece in tokenizer.pieces])
    return int(sizes @ np.bincount(tokens, minlength=len(sizes)))


@dataclass(frozen=True, eq=False)
class Ragged:
    """Texts of any length one after the other: text i is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: Tokens
    """[tokens]"""
    offsets: npt.NDArray[np.int64]
    """[texts + 1]"""

    @classmethod
    def join(cls, texts: Iterable[npt.NDArray[Any]], dtype: np.dtype[Any]) -> Ragged:
        """`texts`, each [its tokens]."""
        kept = [np.empty(0, dtype), *(text.astype(dtype) for text in texts)]
        return cls(np.concatenate(kept), np.cumsum([len(text) for text in kept], dtype=np.int64))

    @classmethod
    def load(cls, folder: Path, name: str, meta: dict[str, Any], tokenizer: Tokenizer) -> Ragged:
        """What a `RaggedWriter` called `name` wrote into `folder`; `meta` is what its `finish` gave."""
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
    """Writes texts one after the other into a file, and at the end where each begins into another."""

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
    """Sources and their targets, without the start token, and without the last token of each."""

    sources: Ragged
    targets: Ragged

    def __len__(self) -> int:
        return len(self.sources)
