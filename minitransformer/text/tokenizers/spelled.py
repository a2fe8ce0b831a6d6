"""Special tokens that are spelled out in a text, and encoded as the tokens that they name."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from minitransformer.text.tokenizers.base import Tokenizer

MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters, which no text should hold"""


def unused_mark(texts: Iterable[str]) -> str:
    """A noncharacter that is in none of the `texts`, of which there are few; the last if all are used."""
    used = set().union(*map(set, texts))
    return next((mark for mark in MARKS if mark not in used), MARKS[-1])


def with_broken_spellings(text: str, spellings: Iterable[str], mark: str) -> str:
    """`text` with `mark` after the first character of each of the `spellings`, so that none is taken for a token."""
    for spelling in sorted(spellings, key=len, reverse=True):
        text = text.replace(spelling, spelling[0] + mark + spelling[1:])
    return text


def encode_segments(
    tokenizer: Tokenizer, segments: Sequence[str], others: Mapping[str, int] | None = None, mark: str = ""
) -> list[list[int]]:
    """The ids of each of the `segments` of a text; special tokens spelled out in them are the tokens.

    `others` are spellings besides those of the tokenizer, and win over them. `mark` is left out of the text.
    """
    text = "".join(segments)
    if not (mark and mark in text) and (located := tokenizer.encode_spelled(text)) is not None:
        return _divided(*located, segments)
    ids = {**tokenizer.special_tokens, **(others or {})}
    pattern = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))))
    return [_encoded_pieces(tokenizer, segment, ids, pattern, mark) for segment in segments]


def encode_with_special_tokens(tokenizer: Tokenizer, text: str, others: Mapping[str, int] | None = None) -> list[int]:
    """The ids of `text`, in which special tokens spelled out are the tokens."""
    [ids] = encode_segments(tokenizer, [text], others)
    return ids


def _divided(ids: Sequence[int], begins: Sequence[int], segments: Sequence[str]) -> list[list[int]]:
    """The ids of each segment, by the place in the text where they begin."""
    ends = list(accumulate(map(len, segments)))
    divided: list[list[int]] = [[] for _ in segments]
    for token, begin in zip(ids, begins, strict=True):
        divided[min(bisect_right(ends, begin), len(segments) - 1)].append(token)
    return divided


def _encoded_pieces(
    tokenizer: Tokenizer, text: str, ids: Mapping[str, int], pattern: re.Pattern[str], mark: str
) -> list[int]:
    encoded: list[int] = []
    begin = 0
    for found in [*pattern.finditer(text), None]:
        piece = text[begin : found.start() if found else None]
        piece = piece.replace(mark, "") if mark else piece
        encoded += tokenizer.encode(piece) if piece else []
        if found:
            encoded.append(ids[found[0]])
            begin = found.end()
    return encoded
