"""What the reports of a folder of results share: its page, a CSV file of each table, a PNG file of each picture."""

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
"""of a table on the page; its CSV file has all"""
MOST_FAILURES = 20
"""that are written out one by one"""


def csv_text(table: Table) -> str:
    """The table as CSV with all digits; a cell of None is empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in table.rows)
    return text.getvalue()


def add_table(page: Page, table: Table, file: str | None = None) -> None:
    """The table under its title, as many rows as a page holds, and a link to the CSV `file` that has all."""
    page.heading(table.title)
    page.table(table.columns, table.rows[:MOST_ROWS])
    if file is not None:
        some = len(table.rows) > MOST_ROWS
        what = f"The first {MOST_ROWS} rows of {len(table.rows)}; all of them:" if some else "With all digits:"
        page.links(what, [Link(file, file)])


def add_picture(page: Page, picture: Picture, path: Path) -> None:
    """Draw the picture on the page and into a PNG file at `path`; raises `UserError` without matplotlib."""
    png = figures.png(picture.draw())
    with files.whole_file(path) as file:
        file.write(png)
    page.figure(png, f"{picture.title}. {picture.caption}".strip(), picture.title)


def add_facts(page: Page, facts: Mapping[str, Any]) -> None:
    """What is known of the command that measured; what is empty is left out, and the command stands elsewhere."""
    page.table(["what", "value"], [(name, value) for name, value in facts.items() if value and name != "command"])


def failed(failures: Sequence[object], what: str) -> list[str]:
    """What is said of `what` failed, one sentence each for the first ones."""
    if not failures:
        return []
    return [
        f"{what} that failed: {len(failures)}. The same command tries them again.",
        *map(str, failures[:MOST_FAILURES]),
    ]


def skipped(lines: int) -> str:
    """What is said of lines of results that could not be read."""
    what = "1 damaged line was" if lines == 1 else f"{lines} damaged lines were"
    return f"{what} skipped in results.jsonl; their tasks were measured again."
