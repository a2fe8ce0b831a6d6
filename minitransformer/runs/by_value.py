"""Documents of running text by a column of their rows, so that windows of each value are evaluated apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from minitransformer.errors import UserError
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.open import Run
from minitransformer.text.columns import column_values
from minitransformer.text.corpora import documents, open_corpus
from minitransformer.text.datasets.text import TooShort

MOST_VALUES = 200
"""of a column, each in a file of its own"""


def texts_by_value(names: Sequence[str], field: str, column: str, folder: Path) -> dict[str, Path]:
    """A .jsonl file in `folder` for each value of `column`, with the text in `field` of its rows.

    Raises `UserError` for files without columns, and for a column of too many values.
    """
    paths: dict[str, Path] = {}
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for path in open_corpus(names, field).files:
            texts = documents(path, field, lambda size: None)
            # The column first: its error is about a file without any.
            for value, parts in zip(column_values(path, column), texts, strict=True):
                if value not in files:
                    if len(files) == MOST_VALUES:
                        raise UserError(f"column {column!r} has more than {MOST_VALUES} values: choose one with fewer")
                    paths[value] = folder / f"{len(files)}.jsonl"
                    files[value] = stack.enter_context(paths[value].open("w", encoding="utf-8"))
                files[value].write(json.dumps({field: "".join(parts)}) + "\n")
    return dict(sorted(paths.items()))


def windows_by_value(
    run: Run, paths: Mapping[str, Path], stride: int | None
) -> Iterator[tuple[str, HeldOutData | None]]:
    """The windows of each value; None for one that has too little text for a window."""
    for value, path in paths.items():
        try:
            yield value, HeldOutData.of_files(run, [str(path)], None, stride)
        except TooShort:
            yield value, None
