"""The special tokens around texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

STORED = {
    "prefix": "before",
    "suffix": "after",
    "forced_bos": "first",
    "forced_eos": "last",
    "suppressed": "never",
}
"""names in tokenizer files, from which their fingerprints are made"""


@dataclass(frozen=True)
class Framing:
    """The special tokens that a model expects around its texts; the defaults are those of training here.

    Raises `TypeError` for values that are not ids.
    """

    prefix: tuple[int, ...] = ()
    """prefix of every input text"""
    suffix: tuple[int, ...] = ()
    """suffix of every complete input text and of every target"""
    start: int | None = None
    """decoder start token; None is the end-of-text token"""
    forced_bos: int | None = None
    """first token of every target, whatever the model predicts"""
    forced_eos: int | None = None
    """last token of a target of maximum length"""
    other_ends: tuple[int, ...] = ()
    """additional end-of-text tokens"""
    suppressed: tuple[int, ...] = ()
    """tokens that are never generated"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            ids = value if isinstance(field.default, tuple) else () if value is None else (value,)
            if not isinstance(ids, tuple | list) or not all(type(token) is int and token >= 0 for token in ids):
                raise TypeError(f"{field.name} is {value!r}, which are not token ids")
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, tuple(ids))  # JSON has lists only

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Framing:
        """The inverse of `to_json`; raises `TypeError` for other names."""
        names = {stored: name for name, stored in STORED.items()}
        return cls(**{names.get(name, name): value for name, value in content.items()})

    def to_json(self) -> dict[str, Any]:
        return {STORED.get(name, name): value for name, value in asdict(self).items()}

    @property
    def length(self) -> int:
        """Number of tokens around a text."""
        return len(self.prefix) + len(self.suffix)

    def around(self, tokens: Iterable[int]) -> list[int]:
        """`tokens` with prefix and suffix."""
        return [*self.prefix, *tokens, *self.suffix]
