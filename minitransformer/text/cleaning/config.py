"""What is cleaned, and how: every choice that the result depends on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.plugins import plugins_behind
from minitransformer.registry import lookup
from minitransformer.settings import Chosen, to_json
from minitransformer.text.caching import hash_of
from minitransformer.text.cleaning.formats import UNITS, DocumentFile, document_file
from minitransformer.text.cleaning.normalising import EXTRA, TextNormalisation, normalisations
from minitransformer.text.cleaning.personal import (
    PersonalData,
    Span,
    find_personal_data,
    kinds_of_personal_data,
    masked,
)
from minitransformer.text.cleaning.quality import QualityRule
from minitransformer.text.corpora import LINES, Corpus, kind, open_corpus
from minitransformer.text.tables import TABLES

DUPLICATES = ("off", "exact", "near")
FORMAT = 1


@dataclass(frozen=True)
class CleaningConfig:
    """How documents are read, changed, compared and judged.

    `alike` is the share of words in common order from which on two documents are near duplicates; `leak_words` is the
    n of the n-grams that a document may not share with the held-out texts `against`. Raises `UserError` for a value
    that cannot be used.
    """

    field: str = "text"
    unit: str = "document"
    normalise: tuple[str, ...] = ("nfc", "control")
    mask: tuple[str, ...] = ()
    duplicates: str = "exact"
    alike: float = 0.85
    against: tuple[str, ...] = ()
    leak_words: int = 13
    rules: tuple[Chosen[QualityRule], ...] = ()
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        lookup("unit", self.unit, dict.fromkeys(UNITS))
        lookup("search for duplicates", self.duplicates, dict.fromkeys(DUPLICATES))
        if not 0.5 <= self.alike < 1:
            raise UserError(f"alike is {self.alike}: it must be at least 0.5 and below 1, such as 0.85")
        if self.leak_words < 1:
            raise UserError(f"leak_words is {self.leak_words}: it must be at least 1, such as 13")
        if self.duplicates == "near":
            check_near()
        normalisations(self.normalise)
        kinds_of_personal_data(self.mask)
        for rule in self.rules:
            rule.make()

    def identity(self, *sources: SourceFiles) -> str:
        """A hash of all that the verdicts depend on: these choices, the files, and plugins."""
        members: list[type] = [TextNormalisation.named(name) for name in self.normalise]
        members += [*PersonalData.registry.values(), *(rule.variant for rule in self.rules)]
        rules = [[rule.name, to_json(rule.settings), rule.make().identity] for rule in self.rules]
        values = {name: value for name, value in vars(self).items() if name != "rules"}
        files = [each.corpus.signature() for each in sources]
        return hash_of([FORMAT, values, rules, files, *plugins_behind(*members)])[:16]


def check_near() -> None:
    """Raises `UserError` if near duplicates cannot be found."""
    if find_spec("rensa") is None:
        raise UserError(f"near duplicates need rensa, which is not installed: {EXTRA}, or give --duplicates exact")


@dataclass(frozen=True)
class SourceFiles:
    """The files to clean, each with its place below the common folder."""

    names: tuple[str, ...]
    corpus: Corpus
    files: tuple[DocumentFile, ...]
    root: Path

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.path.stat().st_size for file in self.files)

    def place(self, file: DocumentFile) -> Path:
        """The path of `file` relative to the common folder."""
        return file.path.resolve().relative_to(self.root)


def open_sources(names: Sequence[str], config: CleaningConfig) -> SourceFiles:
    """The files that `names` name: files, folders, globs or recipes; a file that is named twice is read once."""
    corpus = open_corpus(names, config.field)
    paths = list({path.resolve(): path for path in corpus.files}.values())
    if config.unit != "document" and (rows := [path for path in paths if kind(path) in LINES | TABLES]):
        raise UserError(
            f"--unit {config.unit} is for plain text, and {rows[0]} has a document in each row: leave it out"
        )
    files = tuple(document_file(path, config.field, config.unit) for path in paths)
    root = os.path.commonpath([path.resolve().parent for path in paths])
    return SourceFiles(tuple(names), corpus, files, Path(root))


class Changes:
    """The changes that a document undergoes, in their order: normalisations, then masks."""

    def __init__(self, config: CleaningConfig) -> None:
        self.normalisations = normalisations(config.normalise)
        self.kinds = kinds_of_personal_data()
        self.mask = config.mask

    @cached_property
    def names(self) -> list[str]:
        """The name of each normalisation, in order."""
        return [member.name for member in self.normalisations]

    def of(self, text: str) -> tuple[str, int, list[Span]]:
        """The new text, the normalisations that changed it as a bit set by their order, and its personal data."""
        changed = 0
        for bit, normalise in enumerate(self.normalisations):
            new = normalise(text)
            changed |= (new != text) << bit
            text = new
        spans = find_personal_data(text, self.kinds)
        return masked(text, spans, self.mask), changed, spans

    def new_text(self, text: str) -> str:
        """The new text alone."""
        if self.mask:
            return self.of(text)[0]
        for normalise in self.normalisations:
            text = normalise(text)
        return text
