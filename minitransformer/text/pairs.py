"""Texts that belong together, such as a sentence and its translation, as a stream of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.corpora import LINES, Files, jsonl_documents, kind, read

TABLES = {".tsv"}
Pair = tuple[str, str]
OnRead = Callable[[int], object]


@dataclass(frozen=True)
class PairCorpus(Files):
    """One file of pairs, or two whose lines belong together.

    `fields` are those of a JSONL line that hold source and target; `lowercase` is what is done to both.
    """

    fields: Pair = ("source", "target")
    lowercase: bool = False

    def pairs(self, on_read: OnRead = lambda count: None) -> Iterator[Pair]:
        """Source and target of every pair in order; those of which a side is blank are left out.

        `on_read` hears how many bytes of the files were read since it last heard.
        Raises `UserError` naming the file, and the byte or line, that cannot be read as pairs.
        """
        for source, target in self._raw(on_read):
            if source.strip() and target.strip():
                yield (source.lower(), target.lower()) if self.lowercase else (source, target)

    def _raw(self, on_read: OnRead) -> Iterator[Pair]:
        if len(self.files) == 2:
            return parallel(*self.files, on_read)
        (path,) = self.files
        return jsonl_pairs(path, *self.fields, on_read) if kind(path) in LINES else table(path, on_read)


def lines(path: Path, on_read: OnRead) -> Iterator[str]:
    """The lines of a file without their ends; the last may lack its newline."""
    rest = ""
    for text in read(path, on_read):
        *whole, rest = (rest + text).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    if rest:
        yield rest


def table(path: Path, on_read: OnRead) -> Iterator[Pair]:
    """The first two columns of a TSV file; empty lines are left out."""
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
    """Each line of one file with the line of the other that has its number."""
    sources, targets = lines(source_path, on_read), lines(target_path, on_read)
    for before, (source, target) in enumerate(zip_longest(sources, targets)):
        if source is None or target is None:
            longer = before + sum(1 for _ in chain([None], sources, targets))
            counts = (before, longer) if source is None else (longer, before)
            raise UserError(
                f"{source_path} has {counts[0]} lines and {target_path} has {counts[1]}: "
                "give files whose lines belong together one by one"
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
    """The pairs of `data`, a .tsv or .jsonl file, or any text file whose lines belong to those of `target_data`.

    Each may be packed (.gz). Raises `UserError` when there is no such file, nothing in it, or no way to read it.
    """
    files = tuple(Path(name).expanduser() for name in (data, target_data) if name is not None)
    for name, path in zip((data, target_data), files, strict=False):
        if not path.is_file():
            what = "text, not pairs, in recipe" if name in recipes.known() else "no file"
            raise UserError(f"{what} {name!r}: pairs come from a .tsv, a .jsonl, or two files of parallel lines")
    if target_data is None and kind(files[0]) not in TABLES | LINES:
        raise UserError(
            f"{data} alone holds no pairs: name the file of its targets too (--target-data, --validation-target-data), "
            "or give a .tsv or .jsonl"
        )
    corpus = PairCorpus(data, files, (source_field, target_field), lowercase)
    if next(corpus.pairs(), None) is None:
        raise UserError(f"{data} is empty: put pairs there, of which no side is blank")
    return corpus
