"""The ids that stand around texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Framing:
    """The ids that a model expects beside those of its texts; the defaults stand for what our own training does.

    Raises `TypeError` for what are no ids.
    """

    before: tuple[int, ...] = ()
    """stand before every text that is read"""
    after: tuple[int, ...] = ()
    """stand after every text that is read whole, and after every target"""
    start: int | None = None
    """what a decoder reads before the first token of a target; None is the end of text"""
    first: int | None = None
    """with which every target begins, whatever the model finds likely"""
    last: int | None = None
    """with which a target ends that would grow too long"""
    other_ends: tuple[int, ...] = ()
    """end a text as well as the end of text does"""
    never: tuple[int, ...] = ()
    """are never written"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            ids = value if isinstance(field.default, tuple) else () if value is None else (value,)
            if not isinstance(ids, tuple | list) or not all(type(token) is int and token >= 0 for token in ids):
                raise TypeError(f"{field.name} is {value!r}, which are no token ids")
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, tuple(ids))  # JSON has lists only

    @property
    def length(self) -> int:
        """How many tokens stand around a text."""
        return len(self.before) + len(self.after)

    def around(self, tokens: Iterable[int]) -> list[int]:
        """`tokens` with what stands before and after them."""
        return [*self.before, *tokens, *self.after]
