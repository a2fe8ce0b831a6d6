"""Which scripts the letters of a text belong to."""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

NO_SCRIPT, OTHER = "none", "other"
SCRIPTS = (
    *(NO_SCRIPT, OTHER, "latin", "greek", "cyrillic", "armenian", "hebrew", "arabic", "devanagari", "bengali"),
    *("gurmukhi", "gujarati", "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao", "tibetan"),
    *("georgian", "ethiopic", "khmer", "myanmar", "hangul", "hiragana", "katakana", "cjk"),
)
"""those that are told apart, by the first word of a letter's Unicode name; digits and signs have none"""
LATIN = SCRIPTS.index("latin")


@cache
def _script_of() -> npt.NDArray[np.uint8]:
    """[code points] the index in `SCRIPTS` of the script of each."""
    places = {name.upper(): place for place, name in enumerate(SCRIPTS[2:], start=2)}
    found = np.zeros(0x110000, np.uint8)
    for point in range(0x110000):
        letter = chr(point)
        if letter.isalpha():
            words = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split(" ", 1)
            found[point] = places.get(words[0], 1)
    return found


def count_scripts(text: str) -> npt.NDArray[np.int64]:
    """[scripts] letters of each script in `text`; signs and digits are at the place of `NO_SCRIPT`."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.bincount(_script_of()[codes], minlength=len(SCRIPTS))
