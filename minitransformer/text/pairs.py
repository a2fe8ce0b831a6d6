"""Texts that belong together, such as a sentence and its translation, as a stream of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.text import recipes
from minitransformer.text.corpora import LINES, Corpus, Signature, jsonl_documents, kind, read

TABLES = {".tsv"}
Pair = tuple[str, str]


@dataclass(frozen=True)
class PairCorpus:
    """One file of pairs, or two whose lines belong together.

    `fields` are those of a JSONL line that hold source and target; `lowercase` is what is done to both.
    """

    name: str
    files: tuple[Path, ...]
    fields: Pair = ("source", "target")
    lowercase: bool = False

    def signature(self) -> Signature:
        """What changes when a file does, without reading one."""
        return Corpus(self.name, self.files).signature()

    def pairs(self) -> Iterator[Pair]:
        """Source and target of every pair in order; those of which a side is blank are left out.

        Raises `UserError` naming the file, and the byte or line, that cannot be read as pairs.
        """
        for source, target in self._raw():
            if source.strip() and target.strip():
                yield (source.lower(), target.lower()) if self.lowercase else (source, target)

    def _raw(self) -> Iterator[Pair]:
        if len(self.files) == 2:
            return parallel(*self.files)
        (path,) = self.files
        return jsonl_pairs(path, *self.fields) if kind(path) in LINES else table(path)


def lines(path: Path) -> Iterator[str]:
    """The lines of a file without their ends; the last may lack its newline."""
    rest = ""
    for text in read(path):
        *whole, rest = (rest + text).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    if rest:
        yield rest


def table(path: Path) -> Iterator[Pair]:
    """The first two columns of a TSV file; empty lines are left out."""
    for number, line in enumerate(lines(path), start=1):
        if not line:
            continue
        source, tab, rest = line.partition("\t")
        if not tab:
            raise UserError(f"{path} line {number} has no tab: each line must be source, tab, target")
        yield source, rest.partition("\t")[0]


def jsonl_pairs(path: Path, source_field: str, target_field: str) -> Iterator[Pair]:
    """The two fields of every line of a JSONL file."""
    columns = (jsonl_documents(path, field, lambda count: None) for field in (source_field, target_field))
    for (source,), (target,) in zip(*columns, strict=True):
        yield source, target


def parallel(source_path: Path, target_path: Path) -> Iterator[Pair]:
    """Each line of one file with the line of the other that has its number."""
    sources, targets = lines(source_path), lines(target_path)
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
