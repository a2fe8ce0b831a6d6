"""Pairs of texts as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.text.preparing import Tokens


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

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tokens:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[texts]"""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Sources and their targets, without the start token, and without the last token of each."""

    sources: Ragged
    targets: Ragged

    def __len__(self) -> int:
        return len(self.sources)
