"""Labelled texts: from tables, from files or folders named by their label, and from recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.columns import column_values
from minitransformer.text.corpora import LINES, Files, documents, kind, named, no_such_data, visible_files
from minitransformer.text.pairs import lines
from minitransformer.text.tables import TABLES


class Labelled(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


class LabelSource(NamedTuple):
    """A file of texts: all of class `label`, or with a label in each row; a `whole` file is one text."""

    path: Path
    label: str | None = None
    whole: bool = False


@dataclass(frozen=True)
class LabelCorpus(Files):
    """Labelled texts in `sources`; rows have `fields` for text and label."""

    sources: tuple[LabelSource, ...] = ()
    fields: tuple[str, str] = ("text", "label")
    encoding: str = "utf-8"

    def pairs(self, on_read: Callable[[int], object] = lambda count: None) -> Iterator[Labelled]:
        """Every text with its label, in order, without blank texts.

        `on_read` is called with the number of bytes read since its last call. Raises `UserError` for a row without
        a label, and with the byte or line that cannot be read.
        """
        for source in self.sources:
            for example in self._examples(source, on_read):
                if example.text.strip():
                    yield example

    def column(self, name: str) -> Iterator[str]:
        """The value in column `name` beside every text of `pairs`; raises `UserError` for data without columns."""
        for source in self.sources:
            if source.label is not None:
                raise UserError(f"{source.path} has no columns, and so no {name!r}: give rows as .jsonl, .csv or .tsv")
            texts = documents(source.path, self.fields[0], lambda count: None, self.encoding)
            for text, value in zip(texts, column_values(source.path, name, self.encoding), strict=True):
                if "".join(text).strip():
                    yield value

    def _examples(self, source: LabelSource, on_read: Callable[[int], object]) -> Iterator[Labelled]:
        if source.label is None:
            yield from self._rows(source.path, on_read)
        elif source.whole:
            for parts in documents(source.path, self.fields[0], on_read, self.encoding):
                yield Labelled("".join(parts), source.label)
        else:
            yield from (Labelled(line, source.label) for line in lines(source.path, on_read, self.encoding))

    def _rows(self, path: Path, on_read: Callable[[int], object]) -> Iterator[Labelled]:
        texts = documents(path, self.fields[0], on_read, self.encoding)
        labels = documents(path, self.fields[1], lambda count: None, self.encoding)
        for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
            example = Labelled("".join(text), "".join(label).strip())
            if not example.label:
                raise UserError(f"{path} has no label in row {number}: give each row a {self.fields[1]!r}")
            yield example


def open_labels(
    data: str | Sequence[str], *, field: str = "text", label_field: str = "label", encoding: str = "utf-8"
) -> LabelCorpus:
    """The labelled texts of `data`: tables, .jsonl, text files named by their label, or folders of these.

    In a folder, a folder of its own holds the texts of the label that it is named after, one a file. Raises `UserError`
    for missing or empty data.
    """
    names = [data] if isinstance(data, str) else list(data)
    sources = tuple(source for name in names for source in _sources(name))
    files = tuple(source.path for source in sources)
    corpus = LabelCorpus(named(data), files, sources, (field, label_field), encoding)
    if next(corpus.pairs(), None) is None:
        raise UserError(f"{named(data)} has no labelled text: put texts there that are not blank")
    return corpus


def _sources(name: str) -> Iterator[LabelSource]:
    path = Path(name).expanduser()
    if name in recipes.known():
        yield LabelSource(recipes.make(name))
    elif path.is_file():
        yield _of_file(path)
    elif path.is_dir():
        for member in sorted(path.iterdir()):
            if member.name.startswith("."):
                continue
            if member.is_dir():
                yield from (LabelSource(file, member.name, whole=True) for file in visible_files(member))
            elif member.is_file():
                yield _of_file(member)
    else:
        raise UserError(no_such_data(name))


def _of_file(path: Path) -> LabelSource:
    """Rows with their labels, or a text a line, with the name of the file as label."""
    return LabelSource(path, None if kind(path) in LINES | TABLES else path.name.partition(".")[0])
