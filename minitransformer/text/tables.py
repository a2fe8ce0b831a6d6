"""Documents in one field of every row of CSV, TSV, Parquet or a JSON array."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.records import shown

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARRAYS = {".json"}
PARQUET = {".parquet"}
TABLES = {*DELIMITERS, *ARRAYS, *PARQUET}
ROWS = 1024
"""rows of a Parquet file in memory at a time"""
SPACES = " \t\n\r"


def text_of(record: Any, field: str, path: Path, unit: str, number: int) -> str:
    """The text in `field` of a record; raises `UserError` with its location (`unit` `number`) if there is none."""
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"has no field {field!r}" if text is None else f"has a field {field!r} that is not a string"
        fields = [key for key, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
        remedy = f"its strings are {', '.join(map(repr, fields))}" if fields else "name the field that holds text"
        raise UserError(f"{path} {unit} {number} {found}: {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} {unit} {number} holds half a surrogate pair in {field!r}: write it whole") from None
    return text


def separated(lines: Iterator[str], path: Path, field: str) -> Iterator[str]:
    """The field's text of every row of a CSV or TSV file with a header; `lines` keep their newlines.

    Raises `UserError` with the line of wrong quotes or a wrong number of values.
    """
    rows = separated_rows(lines, path)
    place = column_of(next(rows), field, path)
    for row in rows:
        yield row[place]


def separated_rows(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    """The header of a CSV or TSV file, empty for an empty file, then its rows, each with as many values."""
    # The csv module has one global limit, far below the length of a document.
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(lines, delimiter=delimiter_of(path), strict=True)
    try:
        header = next((row for row in rows if row), [])
        yield header
        for row in filter(None, rows):
            if len(row) != len(header):
                raise UserError(
                    f"{path} line {rows.line_num} has {len(row)} values, and its first line names {len(header)} "
                    "columns: give each row as many values, and quote values that contain separators"
                )
            yield row
    except csv.Error as error:
        raise UserError(
            f"{path} line {rows.line_num} cannot be read ({error}): quote its values as CSV wants, or use .jsonl"
        ) from None


def delimiter_of(path: Path) -> str:
    """What separates the values of a CSV or TSV file, which may be compressed."""
    suffix = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    return DELIMITERS[suffix.lower()]


def column_of(header: Sequence[str], field: str, path: Path) -> int:
    """The index of the column `field`."""
    if header.count(field) != 1:
        how_many = "no column" if field not in header else f"{header.count(field)} columns"
        names = ", ".join(map(repr, header[:20])) or "none"
        raise UserError(
            f"{path} has {how_many} {field!r}: its first line names {names}; choose one with --field, or with "
            "--label-field for labels"
        )
    return header.index(field)


def array(texts: Iterator[str], path: Path, field: str) -> Iterator[str]:
    """The field's text of every object of a JSON array, read one by one."""
    reader = _Elements(texts, path)
    for number, record in enumerate(reader.elements(), start=1):
        yield text_of(record, field, path, "element", number)


class _Elements:
    """An incremental parser of a JSON array of objects."""

    def __init__(self, texts: Iterator[str], path: Path) -> None:
        self.texts, self.path = texts, path
        self.buffer, self.place = "", 0

    def elements(self) -> Iterator[dict[str, Any]]:
        if self._next() != "[":
            raise UserError(
                f"{self.path} is not a JSON array of objects: if each of its lines is an object, rename it to .jsonl; "
                "otherwise write it as one of these"
            )
        self.place += 1
        number, after = 0, self._next()
        while after != "]":
            number += 1
            if after != "{":
                raise UserError(f"{self.path} element {number} is not an object: give an array of objects")
            yield self._object(number)
            after = self._next()
            if after not in (",", "]"):
                raise self._damaged(number, "no comma or ] follows")
            if after == ",":
                self.place += 1
                after = self._next()
        self.place += 1
        if rest := self._next():
            raise UserError(f"{self.path} continues with {shown(rest)} after its array: write a single array")

    def _next(self) -> str:
        """The next character other than whitespace; empty at the end."""
        while True:
            while self.place < len(self.buffer):
                if self.buffer[self.place] not in SPACES:
                    return self.buffer[self.place]
                self.place += 1
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read at least as much again as is buffered, so that long objects are rarely re-parsed; False at the end."""
        held = self.buffer[self.place :]
        parts, size = [held], 0
        for text in self.texts:
            parts.append(text)
            size += len(text)
            if size > len(held):
                break
        self.buffer, self.place = "".join(parts), 0
        return size > 0

    def _object(self, number: int) -> dict[str, Any]:
        while True:
            try:
                record, self.place = json.JSONDecoder().raw_decode(self.buffer, self.place)
                return record
            except RecursionError:
                raise self._damaged(number, "it is nested too deep") from None
            except ValueError as error:
                if not self._more():
                    raise self._damaged(number, str(error)) from None

    def _damaged(self, number: int, why: str) -> UserError:
        return UserError(f"{self.path} element {number} is not JSON ({why}): give one whole array of objects")


def parquet(path: Path, field: str, on_read: Callable[[int], object]) -> Iterator[str]:
    """The field's text of every row of a Parquet file; raises `UserError` without pyarrow."""
    texts = chain.from_iterable(batch.column(0).to_pylist() for batch in record_batches(path, field, on_read, [field]))
    for number, text in enumerate(texts, start=1):
        yield text_of({field: text}, field, path, "row", number)


def record_batches(
    path: Path, field: str, on_read: Callable[[int], object], columns: list[str] | None = None
) -> Iterator[Any]:
    """The rows of a Parquet file that has the column `field`, some at a time; None is all `columns`."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow, which is not installed: pip install pyarrow, or convert it to .jsonl"
        ) from None
    try:
        with ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(map(repr, file.schema_arrow.names[:20]))
                raise UserError(f"{path} has no column {field!r}: it has {names}; choose one with --field")
            size, total, rows, told = path.stat().st_size, file.metadata.num_rows, 0, 0
            for batch in file.iter_batches(ROWS, columns=columns):
                yield batch
                rows += batch.num_rows
                on_read(size * rows // total - told)
                told = size * rows // total
    except (ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a complete Parquet file ({reason}): write it again, or give .jsonl") from None
