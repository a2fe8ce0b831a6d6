"""The values of any column of a file of rows, beside the one that holds a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.text.corpora import LINES, documents, jsonl_records, kind
from minitransformer.text.tables import TABLES


def column_values(path: Path, column: str, encoding: str | None = None) -> Iterator[str]:
    """The value of every row in `column`, as a text; raises `UserError` for a file or a row without it."""
    if kind(path) in LINES:
        for number, row in jsonl_records(path, lambda size: None, encoding):
            yield column_value(row, column, f"{path} line {number}")
    elif kind(path) in TABLES:
        for parts in documents(path, column, lambda size: None, encoding):
            yield "".join(parts)
    else:
        raise UserError(f"{path} has no columns, and so no {column!r}: give rows as .jsonl, .csv or .tsv")


def column_value(row: object, column: str, where: str) -> str:
    """The value of a row of JSON in `column`, as a text; raises `UserError` if it has none, or a list or an object."""
    names = ", ".join(map(repr, row)) if isinstance(row, dict) else "none"
    if not isinstance(row, dict) or column not in row:
        raise UserError(f"{where} has no column {column!r}, only {names}: choose one that all rows have")
    value = row[column]
    if isinstance(value, list | dict):
        raise UserError(f"{where} has no single value in column {column!r}: choose one with texts or numbers")
    return str(value)
