"""Source-target pairs, such as a sentence and its translation, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.columns import column_values
from minitransformer.text.corpora import LINES, Files, jsonl_documents, kind, read

TABLES = {".tsv"}
Pair = tuple[str, str]
OnRead = Callable[[int], object]


@dataclass(frozen=True)
class PairCorpus(Files):
    """One file of pairs, or two parallel files.

    `fields` are the JSONL fields of source and target; `lowercase` applies to both.
    """

    fields: Pair = ("source", "target")
    lowercase: bool = False

    def pairs(self, on_read: OnRead = lambda count: None) -> Iterator[Pair]:
        """Source and target of every pair in order, without pairs with a blank side.

        `on_read` is called with the number of bytes read since its last call.
        Raises `UserError` with the file, and the byte or line, that cannot be read as pairs.
        """
        for source, target in self._raw(on_read):
            if source.strip() and target.strip():
                yield (source.lower(), target.lower()) if self.lowercase else (source, target)

    def column(self, name: str) -> Iterator[str]:
        """The value in column `name` beside every pair; raises `UserError` for files whose columns have no names."""
        path = self.files[0]
        if kind(path) not in LINES:
            raise UserError(f"{path} has no columns with names, and so no {name!r}: give pairs as .jsonl")
        for (source, target), value in zip(self._raw(lambda count: None), column_values(path, name), strict=True):
            if source.strip() and target.strip():
                yield value

    def _raw(self, on_read: OnRead) -> Iterator[Pair]:
        if len(self.files) == 2:
            return parallel(*self.files, on_read)
        (path,) = self.files
        return jsonl_pairs(path, *self.fields, on_read) if kind(path) in LINES else table(path, on_read)


def lines(path: Path, on_read: OnRead, encoding: str | None = None) -> Iterator[str]:
    """The lines of a file without newlines."""
    rest = ""
    for text in read(path, on_read, encoding):
        *whole, rest = (rest + text).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    if rest:
        yield rest


def table(path: Path, on_read: OnRead) -> Iterator[Pair]:
    """The first two columns of a TSV file, without empty lines."""
    for number, line in enumerate(lines(path, on_read), start=1):
        if not line:
            continue
        source, tab, rest = line.partition("\t")
        if not tab:
            raise UserError(f"{path} line {number} has no tab: each line must be source, tab, target")
        yield source, rest.partition("\t")[0]


def jsonl_pairs(path: Path, source_field: str, target_field: str, on_read: OnRead) -> Iterator[Pair]:
    """The two fields of every line of a JSONL file."""
    sources = jsonl_documents(path, source_field, on_read)
    targets = jsonl_documents(path, target_field, lambda count: None)
    for (source,), (target,) in zip(sources, targets, strict=True):
        yield source, target


def parallel(source_path: Path, target_path: Path, on_read: OnRead) -> Iterator[Pair]:
    """The lines of two files in parallel."""
    sources, targets = lines(source_path, on_read), lines(target_path, on_read)
    for before, (source, target) in enumerate(zip_longest(sources, targets)):
        if source is None or target is None:
            longer = before + sum(1 for _ in chain([None], sources, targets))
            counts = (before, longer) if source is None else (longer, before)
            raise UserError(
                f"{source_path} has {counts[0]} lines and {target_path} has {counts[1]}: "
                "give parallel files, whose lines correspond one to one"
            )
        yield source, target


def open_pairs(
    data: str,
    target_data: str | None = None,
    *,
    source_field: str = "source",
    target_field: str = "target",
    lowercase: bool = False,
) -> PairCorpus:
    """The pairs of `data`, a .tsv or .jsonl file, or a text file parallel to `target_data`.

    Files may be compressed (.gz). Raises `UserError` for a missing, empty or unreadable file.
    """
    files = tuple(Path(name).expanduser() for name in (data, target_data) if name is not None)
    for name, path in zip((data, target_data), files, strict=False):
        if not path.is_file():
            what = "text, not pairs, in recipe" if name in recipes.known() else "no file"
            raise UserError(f"{what} {name!r}: give a .tsv, a .jsonl, or two parallel files")
    if target_data is None and kind(files[0]) not in TABLES | LINES:
        raise UserError(
            f"{data} alone has no pairs: give the file of its targets too (--target-data, --validation-target-data), "
            "or give a .tsv or .jsonl"
        )
    corpus = PairCorpus(data, files, (source_field, target_field), lowercase)
    if next(corpus.pairs(), None) is None:
        raise UserError(f"{data} is empty: put pairs there without blank sides")
    return corpus
