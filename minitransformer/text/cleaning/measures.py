"""Sizes and scripts of many texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minitransformer.text.cleaning.scripts import LATIN, SCRIPTS, count_scripts

_Counts = npt.NDArray[np.int64]


class Measures(NamedTuple):
    """Of each text, its words (what stands between spaces), and its characters by script, as `count_scripts` says."""

    words: _Counts
    """[texts]"""
    scripts: _Counts
    """[texts, scripts]"""

    @property
    def main_scripts(self) -> _Counts:
        """[texts] the index in `SCRIPTS` of the most frequent script among letters; 0 without letters."""
        letters = self.scripts[:, 1:]
        return np.where(letters.any(1), letters.argmax(1) + 1, 0)


@cache
def _ascii_classes() -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """[256] which bytes of ASCII text are spaces, and which are letters."""
    letters = [chr(point) for point in range(256)]
    return (
        np.array([letter.isspace() for letter in letters]),
        np.array([letter.isalpha() and letter.isascii() for letter in letters]),
    )


def measure_texts(texts: Sequence[str]) -> Measures:
    """The measures of `texts`; those in ASCII, which are most, are measured together."""
    measures = Measures(np.zeros(len(texts), np.int64), np.zeros((len(texts), len(SCRIPTS)), np.int64))
    plain = [number for number, text in enumerate(texts) if text.isascii()]
    if plain:
        lengths = np.array([len(texts[number]) for number in plain])
        measures.words[plain], letters = _measure_ascii([texts[number] for number in plain])
        measures.scripts[plain, 0], measures.scripts[plain, LATIN] = lengths - letters, letters
    for number, text in enumerate(texts):
        if not text.isascii():
            measures.words[number], measures.scripts[number] = len(text.split()), count_scripts(text)
    return measures


def _measure_ascii(texts: Sequence[str]) -> tuple[_Counts, _Counts]:
    """[texts] words and letters of each text."""
    data = np.frombuffer(("\n" + "\n".join(texts) + "\n").encode(), np.uint8)
    starts = np.fromiter(accumulate((len(text) + 1 for text in texts[:-1]), initial=1), np.int64, len(texts))
    is_space, is_letter = _ascii_classes()
    spaces = is_space[data]
    begins = np.zeros(len(data), bool)
    begins[1:] = spaces[:-1] & ~spaces[1:]
    return (
        np.add.reduceat(begins, starts, dtype=np.int64),
        np.add.reduceat(is_letter[data], starts, dtype=np.int64),
    )
