"""Quality rules: each is a class that says whether a document is refused, registered by name, with its settings."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.errors import UserError, suggestion
from minitransformer.records import read_bytes
from minitransformer.registry import Registered
from minitransformer.settings import setting
from minitransformer.text.cleaning.measures import measure_texts
from minitransformer.text.cleaning.ngrams import HashedTexts, hash_ngrams
from minitransformer.text.cleaning.scripts import NO_SCRIPT, SCRIPTS

WORD = re.compile(r"\w+")
SOME = 1 << 20
"""characters at the beginning of a document by which its quality is judged"""


class Judged:
    """A document under judgement: its text, and what several rules ask of it."""

    def __init__(self, text: str) -> None:
        self.text = text[:SOME]

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without surrounding spaces."""
        return [line for each in self.text.split("\n") if (line := each.strip())]


class QualityRule(Registered, kind="quality rule"):
    """A rule that refuses documents; it judges one document by itself."""

    def __init__(self, settings: Any) -> None:
        """Raises `UserError` for settings that cannot be used."""
        self.settings = settings

    @property
    def identity(self) -> str:
        """What it depends on besides its settings, such as the content of a file."""
        return ""

    def refuses(self, document: Judged) -> bool:
        """Whether the document is removed."""
        raise NotImplementedError


class Length(QualityRule, name="length"):
    """Documents with too few or too many words."""

    @dataclass(frozen=True)
    class Settings:
        least: int = setting(5, at_least=0, help="fewest words of a document")
        most: int = setting(100_000, at_least=1, help="most words of a document")

    def refuses(self, document: Judged) -> bool:
        return not self.settings.least <= len(document.words) <= self.settings.most


class Repetition(QualityRule, name="repetition"):
    """Documents that repeat themselves: in their lines, or in their most frequent two to four words.

    Rae et al. 2021 (Gopher, arXiv 2112.11446), table A1: lines that occurred before, and the characters of the most
    frequent n-gram, over those of the document.
    """

    @dataclass(frozen=True)
    class Settings:
        lines: float = setting(0.3, at_least=0, at_most=1, help="largest share of lines that occurred before")
        words: float = setting(
            0.2,
            at_least=0,
            at_most=1,
            help="largest share of the most frequent two words (three: 0.9, four: 0.8 of it)",
        )

    def refuses(self, document: Judged) -> bool:
        lines = document.lines
        if len(lines) > 1 and len(lines) - len(set(lines)) > self.settings.lines * len(lines):
            return True
        words = document.words
        most = [(2, 1.0), (3, 0.9), (4, 0.8)]
        return any(_share_of_top(words, n) > self.settings.words * factor for n, factor in most)


def _share_of_top(words: Sequence[str], n: int) -> float:
    """The share of the characters of `words` in the most frequent n-gram, if it occurs at least three times."""
    if len(words) < 2 * n:
        return 0.0
    codes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    grams = hash_ngrams(HashedTexts(codes, np.array([0, len(codes)])), n).hashes
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    sizes = np.convolve(lengths, np.ones(n, np.int64), "valid")[first]
    return float(((counts > 2) * counts * sizes).max() / lengths.sum())


class Symbols(QualityRule, name="symbols"):
    """Documents with too many characters that are no letters, digits or spaces."""

    @dataclass(frozen=True)
    class Settings:
        share: float = setting(0.3, at_least=0, at_most=1, help="largest share of symbols among characters")

    def refuses(self, document: Judged) -> bool:
        ordinary = sum(map(len, WORD.findall(document.text))) - document.text.count("_")
        spaces = len(document.text) - sum(map(len, document.words))
        return len(document.text) - ordinary - spaces > self.settings.share * len(document.text)


class Script(QualityRule, name="script"):
    """Documents of which too few letters belong to a script; a document without letters is kept."""

    @dataclass(frozen=True)
    class Settings:
        wanted: str = setting("latin", help=f"scripts, with commas between them: {', '.join(SCRIPTS[2:])}")
        share: float = setting(0.5, at_least=0, at_most=1, help="smallest share of letters of the wanted scripts")

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        names = [name.strip() for name in settings.wanted.split(",")]
        for name in names:
            if name not in SCRIPTS or name == NO_SCRIPT:
                raise UserError(
                    f"unknown script {name!r}: {suggestion(name, SCRIPTS)}known are {', '.join(SCRIPTS[2:])}"
                )
        self.places = [SCRIPTS.index(name) for name in names]

    def refuses(self, document: Judged) -> bool:
        counts = measure_texts([document.text]).scripts[0]
        return bool(counts[self.places].sum() < self.settings.share * counts[1:].sum())


class WordList(QualityRule, name="word-list"):
    """Documents with words of a list, whatever their case."""

    @dataclass(frozen=True)
    class Settings:
        file: str = setting("", help="text file with a word in each line")
        allowed: int = setting(0, at_least=0, help="most occurrences in a document")

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if not settings.file:
            raise UserError("the quality rule word-list needs a list: name a text file with --word-list-file")
        content = read_bytes(Path(settings.file), "name a text file with a word in each line")
        try:
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{settings.file} is not UTF-8: convert it") from None
        self.list = frozenset(line.strip().lower() for line in lines if line.strip())
        if not self.list:
            raise UserError(f"{settings.file} has no words: give one in each line")
        if several := next((word for word in sorted(self.list) if not WORD.fullmatch(word)), None):
            raise UserError(f"{settings.file} has {several!r}, which is not one word: give one in each line")
        self._identity = hashlib.sha256(content).hexdigest()

    @property
    def identity(self) -> str:
        return self._identity

    def refuses(self, document: Judged) -> bool:
        words = Counter(WORD.findall(document.text.lower()))
        return sum(words[word] for word in self.list & words.keys()) > self.settings.allowed
