"""Bytes and characters: vocabularies that need no training."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.text.tokenizers.base import Texts, Tokenizer, not_text, special_tokens_in, typed_entry

CODE_POINTS = 0x110000


class Bytes(Tokenizer, name="bytes"):
    """The 256 values of a UTF-8 byte. Xue et al. 2022, ByT5 (arXiv 2105.13626)."""

    in_gguf = True

    def __init__(self, special_tokens: dict[str, int] | None = None) -> None:
        super().__init__([bytes([value]) for value in range(256)], special_tokens)

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        return cls().check_vocab_size(vocab_size)

    @classmethod
    def usual_vocab_size(cls, settings: Any) -> int:
        return 256 + 1

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        except UnicodeEncodeError as error:
            raise not_text(error) from None

    def to_json(self) -> dict[str, Any]:
        return self._described()

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(special_tokens_in(content))


class Characters(Tokenizer, name="chars"):
    """One id per character of the training text, in code point order."""

    def __init__(self, characters: str, special_tokens: dict[str, int] | None = None) -> None:
        if sorted(set(characters)) != list(characters):
            raise ValueError("characters must be sorted and distinct")
        super().__init__([character.encode() for character in characters], special_tokens)
        self.characters = characters
        points = self._points(characters)
        self._unknown = len(points)
        # One row more than the highest code point: higher ones are clamped to it, and unknown.
        self._ids = np.full(int(points.max(initial=0)) + 2, self._unknown, np.uint32)
        self._ids[points] = np.arange(len(points))

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        seen = np.zeros(CODE_POINTS, bool)
        for text in texts():
            seen[cls._points(text)] = True
        return cls("".join(map(chr, np.flatnonzero(seen)))).check_vocab_size(vocab_size)

    @classmethod
    def usual_vocab_size(cls, settings: Any) -> int:
        return 66  # Tiny Shakespeare's

    @staticmethod
    def _points(text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.frombuffer(text.encode("utf-32-le"), "<u4")
        except UnicodeEncodeError as error:
            raise not_text(error) from None

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        points = self._points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids == self._unknown)
        if unknown.size:
            first = text[unknown[0]]
            raise UserError(
                f"character {first!r} (U+{ord(first):04X}) is not among the {len(self.characters)} of this chars "
                "tokenizer: leave it out, or train with the bpe or bytes tokenizer, which encode every text"
            )
        return ids

    def to_json(self) -> dict[str, Any]:
        return self._described(characters=self.characters)

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(typed_entry(content, "characters", str), special_tokens_in(content))
