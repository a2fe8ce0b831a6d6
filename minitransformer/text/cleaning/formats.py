"""Files of documents: read in blocks, which other processes parse, and written again without some of the documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from minitransformer.errors import UserError
from minitransformer.text.corpora import LINES, kind, read, split_lines
from minitransformer.text.pairs import OnRead
from minitransformer.text.tables import (
    ARRAYS,
    DELIMITERS,
    PARQUET,
    column_of,
    delimiter_of,
    record_batches,
    separated_rows,
    text_of,
)

BLOCK = 1 << 20
"""characters of a block, at least"""
MOST = 1 << 26
"""characters of a document that is cleaned as a whole"""
UNITS = ("document", "paragraph", "line")


class Unit(NamedTuple):
    """A document, and what it was read from."""

    text: str
    raw: Any


class Sink(Protocol):
    """A file that documents are written to."""

    def write(self, part: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class DocumentFile(ABC):
    """A file of documents, one in `field` of each row, or one in each `unit` of a text."""

    path: Path
    field: str = "text"
    unit: str = "document"

    @abstractmethod
    def blocks(self, on_read: OnRead, *, whole: bool) -> Iterator[Any]:
        """The file in parts of whole documents; only with `whole` can they be written again."""

    @abstractmethod
    def parse(self, block: Any) -> list[Unit]:
        """The documents of a block, in order."""

    @abstractmethod
    def render(self, block: Any, kept: Sequence[tuple[int, Unit, str]]) -> Any:
        """What is written of a block: of each `kept` document its number in it, what it was, and its new text."""

    def open_sink(self, file: BinaryIO) -> Sink:
        """What writes the rendered blocks to `file`."""
        return TextSink(file, self.path.suffix.lower() == ".gz")


@dataclass(frozen=True)
class TextSink:
    """UTF-8 text, compressed block by block if it is `packed`."""

    file: BinaryIO
    packed: bool

    def write(self, part: str) -> None:
        content = part.encode()
        self.file.write(gzip.compress(content, mtime=0) if self.packed else content)

    def close(self) -> None:
        if self.packed and not self.file.tell():
            self.file.write(gzip.compress(b"", mtime=0))


class JsonLines(DocumentFile):
    """An object in each line; a line whose text is unchanged stays as it is."""

    def blocks(self, on_read: OnRead, *, whole: bool) -> Iterator[tuple[int, str]]:
        first = 1
        for text in cut_after(read(self.path, on_read), ("\n",), self.path):
            yield first, text
            first += text.count("\n")

    def parse(self, block: tuple[int, str]) -> list[Unit]:
        units = []
        for number, line in enumerate(block[1].split("\n"), start=block[0]):
            if line and not line.isspace():
                units.append(Unit(text_of(self._record(line, number), self.field, self.path, "line", number), line))
        return units

    def _record(self, line: str, number: int) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} line {number} is not JSON ({error}): each line must be one object") from None

    def render(self, block: tuple[int, str], kept: Sequence[tuple[int, Unit, str]]) -> str:
        return "".join((unit.raw if text == unit.text else self._line(unit.raw, text)) + "\n" for _, unit, text in kept)

    def _line(self, line: str, text: str) -> str:
        record = {**json.loads(line), self.field: text}
        written = json.dumps(record, ensure_ascii=False)
        try:
            written.encode()
        except UnicodeEncodeError:  # another field holds half a surrogate pair
            return json.dumps(record)
        return written


class SeparatedValues(DocumentFile):
    """The rows of a CSV or TSV file with a header."""

    def blocks(self, on_read: OnRead, *, whole: bool) -> Iterator[tuple[int, list[list[str]], int]]:
        rows = separated_rows((line + "\n" for line in split_lines(read(self.path, on_read))), self.path)
        header = next(rows)
        place = column_of(header, self.field, self.path)
        held, size, headers = [header], 0, 1
        for row in rows:
            held.append(row if whole else [row[place]])
            size += sum(map(len, row))  # whether whole or not, so that blocks are the same
            if size >= BLOCK:
                yield place if whole else 0, held, headers
                held, size, headers = [], 0, 0
        yield place if whole else 0, held, headers

    def parse(self, block: tuple[int, list[list[str]], int]) -> list[Unit]:
        place, rows, headers = block
        return [Unit(row[place], row) for row in rows[headers:]]

    def render(self, block: tuple[int, list[list[str]], int], kept: Sequence[tuple[int, Unit, str]]) -> str:
        place, rows, headers = block
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter_of(self.path), lineterminator="\n")
        writer.writerows(rows[:headers])
        writer.writerows([*unit.raw[:place], new, *unit.raw[place + 1 :]] for _, unit, new in kept)
        return text.getvalue()


class ParquetRows(DocumentFile):
    """The rows of a Parquet file."""

    def blocks(self, on_read: OnRead, *, whole: bool) -> Iterator[tuple[int, Any]]:
        first = 1
        for batch in record_batches(self.path, self.field, on_read, None if whole else [self.field]):
            yield first, batch
            first += batch.num_rows

    def parse(self, block: tuple[int, Any]) -> list[Unit]:
        first, batch = block
        texts = batch.column(batch.schema.get_field_index(self.field)).to_pylist()
        return [
            Unit(text_of({self.field: text}, self.field, self.path, "row", number), None)
            for number, text in enumerate(texts, start=first)
        ]

    def render(self, block: tuple[int, Any], kept: Sequence[tuple[int, Unit, str]]) -> Any:
        import pyarrow

        _, batch = block
        rows = batch.take(pyarrow.array([number for number, _, _ in kept], pyarrow.int64()))
        if all(text == unit.text for _, unit, text in kept):
            return rows
        place = batch.schema.get_field_index(self.field)
        texts = pyarrow.array([text for _, _, text in kept], pyarrow.string()).cast(batch.schema.field(place).type)
        return rows.set_column(place, batch.schema.field(place), texts)

    def open_sink(self, file: BinaryIO) -> Sink:
        return ParquetSink(file, self.path)


class ParquetSink:
    """A Parquet file with the schema of the file `source`."""

    def __init__(self, file: BinaryIO, source: Path) -> None:
        from pyarrow.parquet import ParquetWriter, read_schema

        self._writer = ParquetWriter(file, read_schema(source))

    def write(self, part: Any) -> None:
        self._writer.write_batch(part)

    def close(self) -> None:
        self._writer.close()


# What ends a line, or a paragraph: blank lines belong to the end, the indentation of the next line does not.
ENDS = {"line": re.compile(r"(\r?\n(?:[ \t]*\r?\n)*)"), "paragraph": re.compile(r"(\r?\n(?:[ \t]*\r?\n)+)")}
CUTS = {"line": ("\n",), "paragraph": ("\n\n", "\n\r\n")}


class PlainDocuments(DocumentFile):
    """A text that is one document, or as many as it has paragraphs or lines, without those that are blank."""

    def blocks(self, on_read: OnRead, *, whole: bool) -> Iterator[str]:
        yield from cut_after(read(self.path, on_read), CUTS.get(self.unit, ()), self.path)

    def parse(self, block: str) -> list[Unit]:
        if self.unit == "document":
            return [Unit(block, ("", ""))]
        parts = ENDS[self.unit].split(block)
        units, before = [], ""
        for text, end in zip(parts[::2], [*parts[1::2], ""], strict=True):
            if text and not text.isspace():
                units.append(Unit(text, (before, end)))
                before = ""
            else:
                before += text + end
        if units:
            text, (first, end) = units[-1]
            units[-1] = Unit(text, (first, end + before))
        return units

    def render(self, block: str, kept: Sequence[tuple[int, Unit, str]]) -> str:
        return "".join(f"{unit.raw[0]}{text}{unit.raw[1]}" for _, unit, text in kept)


def cut_after(texts: Iterable[str], ends: Sequence[str], path: Path) -> Iterator[str]:
    """`texts`, joined and cut after the last of the `ends` in about `BLOCK` characters; without `ends` it is whole.

    Raises `UserError` for more than `MOST` characters without an end.
    """
    held, size = [""], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size > MOST:
            raise UserError(
                f"{path} has a document of more than {MOST >> 20} million characters: clean it by --unit paragraph or "
                "--unit line, or split it"
            )
        if size >= BLOCK and ends:
            joined = "".join(held)
            place = max(joined.rfind(end) + len(end) if end in joined else 0 for end in ends)
            if place:
                yield joined[:place]
            held, size = [joined[place:]], len(joined) - place
    if rest := "".join(held):
        yield rest


def document_file(path: Path, field: str, unit: str) -> DocumentFile:
    """How the documents of the file at `path` are read; raises `UserError` for a JSON array."""
    suffix = kind(path)
    if suffix in ARRAYS:
        raise UserError(f"{path} is a JSON array: write one object a line, as .jsonl, and clean that")
    if suffix in LINES:
        return JsonLines(path, field)
    if suffix in DELIMITERS:
        return SeparatedValues(path, field)
    return ParquetRows(path, field) if suffix in PARQUET else PlainDocuments(path, unit=unit)
