"""Shared parts of reports: a page, a CSV file per table and a PNG file per picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.reporting import figures
from minitransformer.reporting.pages import Link, Page
from minitransformer.reporting.tables import Picture, Table

REPORT = "report.html"
MOST_ROWS = 200
"""maximum rows of a table on the page; its CSV file has all"""
MOST_FAILURES = 20
"""maximum failures that are listed"""


def csv_text(table: Table) -> str:
    """The table as CSV in full precision; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in table.rows)
    return text.getvalue()


def add_table(page: Page, table: Table, file: str | None = None) -> None:
    """Add the table with its title, truncated to a maximum of rows, and a link to the full CSV `file`."""
    page.heading(table.title)
    page.table(table.columns, table.rows[:MOST_ROWS])
    if file is not None:
        some = len(table.rows) > MOST_ROWS
        what = f"The first {MOST_ROWS} of {len(table.rows)} rows; all rows:" if some else "In full precision:"
        page.links(what, [Link(file, file)])


def add_picture(page: Page, picture: Picture, path: Path) -> None:
    """Add the picture to the page, and write it to `path` as PNG; raises `UserError` without matplotlib."""
    png = figures.png(picture.draw())
    with files.whole_file(path) as file:
        file.write(png)
    page.figure(png, f"{picture.title}. {picture.caption}".strip(), picture.title)


def add_facts(page: Page, facts: Mapping[str, Any]) -> None:
    """Add the provenance of the measurement, without empty entries and the command itself."""
    page.table(["what", "value"], [(name, value) for name, value in facts.items() if value and name != "command"])


def failed(failures: Sequence[object], what: str) -> list[str]:
    """Sentences on the failures of `what`, one each for the first ones."""
    if not failures:
        return []
    return [
        f"{what} that failed: {len(failures)}. The same command retries them.",
        *map(str, failures[:MOST_FAILURES]),
    ]


def skipped(lines: int) -> str:
    """A sentence on unreadable lines of results."""
    what = "1 damaged line was" if lines == 1 else f"{lines} damaged lines were"
    return f"{what} skipped in results.jsonl; their tasks were measured again."
