"""The values of any column of a file of rows, beside the one that holds a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.text.corpora import LINES, documents, jsonl_records, kind, read, split_lines
from minitransformer.text.tables import DELIMITERS, TABLES, separated_rows

EMPTY = "(empty)"
"""a value without text"""


def column_values(path: Path, column: str, encoding: str | None = None) -> Iterator[str]:
    """The value of every row in `column`, as a text; raises `UserError` for a file or a row without it."""
    suffix = kind(path)
    if suffix in LINES:
        for number, row in jsonl_records(path, lambda size: None, encoding):
            yield column_value(row, column, f"{path} line {number}")
    elif suffix in DELIMITERS:
        rows = separated_rows((line + "\n" for line in split_lines(read(path, encoding=encoding))), path)
        header = next(rows)
        if header.count(column) != 1:
            raise _no_column(str(path), column, header)
        yield from (row[header.index(column)] or EMPTY for row in rows)
    elif suffix in TABLES:
        for parts in documents(path, column, lambda size: None, encoding):
            yield "".join(parts) or EMPTY
    else:
        raise UserError(f"{path} has no columns, and so no {column!r}: give rows as .jsonl, .csv or .tsv")


def column_value(row: object, column: str, where: str) -> str:
    """The value of a row of JSON in `column`, as a text; raises `UserError` if it has none, or a list or an object."""
    if not isinstance(row, dict) or column not in row:
        raise _no_column(where, column, row if isinstance(row, dict) else ())
    value = row[column]
    if isinstance(value, list | dict):
        raise UserError(f"{where} has no single value in column {column!r}: choose one with texts or numbers")
    return str(value) or EMPTY


def _no_column(where: str, column: str, names: Iterable[str]) -> UserError:
    known = ", ".join(map(repr, names)) or "none"
    return UserError(f"{where} has no column {column!r}, only {known}: choose one that all rows have")
