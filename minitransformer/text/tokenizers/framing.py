"""The special tokens around texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Framing:
    """The special tokens that a model expects around its texts; the defaults are those of training here.

    Raises `TypeError` for values that are not ids.
    """

    before: tuple[int, ...] = ()
    """prefix of every input text"""
    after: tuple[int, ...] = ()
    """suffix of every complete input text and of every target"""
    start: int | None = None
    """decoder start token; None is the end-of-text token"""
    first: int | None = None
    """forced first token of every target (forced BOS)"""
    last: int | None = None
    """forced last token of a target of maximum length (forced EOS)"""
    other_ends: tuple[int, ...] = ()
    """additional end-of-text tokens"""
    never: tuple[int, ...] = ()
    """suppressed tokens, which are never generated"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            ids = value if isinstance(field.default, tuple) else () if value is None else (value,)
            if not isinstance(ids, tuple | list) or not all(type(token) is int and token >= 0 for token in ids):
                raise TypeError(f"{field.name} is {value!r}, which are not token ids")
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, tuple(ids))  # JSON has lists only

    @property
    def length(self) -> int:
        """Number of tokens around a text."""
        return len(self.before) + len(self.after)

    def around(self, tokens: Iterable[int]) -> list[int]:
        """`tokens` with prefix and suffix."""
        return [*self.before, *tokens, *self.after]
