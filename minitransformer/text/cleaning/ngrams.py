"""Words and n-grams of texts as 64-bit hashes, which are the same in every process and on every machine."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
PART = 1 << 20
"""characters that are hashed at a time"""
LONGEST = 1 << 10
"""period of the weights of a word's characters"""
ODD = np.uint64(0x9E3779B97F4A7C15)
SEPARATOR, IN_WORD, ALONE = 0, 1, 2
# Scripts without spaces between words: kana, CJK ideographs, Thai, Lao, Khmer, Myanmar.
UNSPACED = [(0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000)]
UNSPACED += [(0xE00, 0xF00), (0x1000, 0x10A0), (0x1780, 0x1800)]


class HashedTexts(NamedTuple):
    """Hashes of the parts of several texts: those of text i are `hashes[offsets[i] : offsets[i + 1]]`."""

    hashes: Hashes
    """[parts]"""
    offsets: npt.NDArray[np.int64]
    """[texts + 1]"""


@cache
def _classes() -> npt.NDArray[np.uint8]:
    """[code points] whether each separates words, belongs to one, or is one."""
    classes = np.zeros(0x110000, np.uint8)
    for point in range(0x110000):
        letter = chr(point)
        classes[point] = IN_WORD if letter.isalnum() or unicodedata.category(letter)[0] == "M" else SEPARATOR
    for first, last in UNSPACED:
        classes[first:last] *= ALONE
    return classes


@cache
def _weights() -> Hashes:
    return np.cumprod(np.full(LONGEST, ODD), dtype=np.uint64)


def mixed(values: Hashes) -> Hashes:
    """Each of `values` mixed to 64 random-looking bits (the finalizer of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def hash_words(texts: Sequence[str]) -> HashedTexts:
    """The words of each text in order, without case and punctuation; a letter of an unspaced script is a word."""
    lowered = [text.lower() for text in texts]
    joined = "\n".join(lowered)
    ends = np.fromiter(accumulate(len(text) + 1 for text in lowered), np.int64, len(lowered))
    hashes, starts = [], []
    for first, part in _parts(joined):
        of_part, at = _hash_part(part)
        hashes.append(of_part)
        starts.append(at + first)
    places = np.concatenate([np.empty(0, np.int64), *starts])
    offsets = np.concatenate([np.zeros(1, np.int64), np.searchsorted(places, ends)])
    return HashedTexts(np.concatenate([np.empty(0, np.uint64), *hashes]), offsets)


def _parts(text: str) -> list[tuple[int, str]]:
    """`text` in parts of bounded length that end between words, each with its place."""
    parts, start = [], 0
    while start < len(text):
        end = min(start + PART, len(text))
        while end < len(text) and text[end].isalnum():
            end += 1
        parts.append((start, text[start:end]))
        start = end
    return parts


def _hash_part(text: str) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The words of `text`, and where each begins."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    classes = _classes()[codes]
    in_word = classes > SEPARATOR
    joins = np.zeros(len(codes), bool)
    joins[1:] = (classes[1:] == IN_WORD) & (classes[:-1] == IN_WORD)
    starts = np.flatnonzero(in_word & ~joins)
    if not len(starts):
        return np.empty(0, np.uint64), starts
    lengths = np.diff(starts, append=len(codes))
    inside = np.arange(starts[0], len(codes)) - np.repeat(starts, lengths)
    weighted = (codes[starts[0] :].astype(np.uint64) + ODD) * _weights()[inside % LONGEST]
    weighted[~in_word[starts[0] :]] = 0
    return mixed(np.add.reduceat(weighted, starts - starts[0])), starts


def hash_ngrams(words: HashedTexts, n: int) -> HashedTexts:
    """The n-grams of each text; one of fewer than n words has one, of all of them, and one without words has none."""
    counts = np.diff(words.offsets)
    texts = len(counts)
    # Each text is followed by n - 1 empty words, so that no n-gram holds words of two texts.
    begins = words.offsets[:-1] + np.arange(texts) * (n - 1)
    padded = np.zeros(len(words.hashes) + texts * (n - 1), np.uint64)
    padded[np.arange(len(words.hashes)) + np.repeat(np.arange(texts) * (n - 1), counts)] = words.hashes
    grams = np.maximum(counts - n + 1, np.minimum(counts, 1))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(grams)])
    places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], grams)
    hashes = np.zeros(len(places), np.uint64)
    for shift in range(n):
        hashes = hashes * ODD + padded[places + shift]
    return HashedTexts(mixed(hashes), offsets)
