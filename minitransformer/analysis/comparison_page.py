"""A comparison as one self-contained HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from minitransformer.analysis.compare import RunComparison
from minitransformer.reporting import figures
from minitransformer.reporting.pages import Link, Page


def comparison_page(comparison: RunComparison, command: str, folder: Path, csv: Path | None = None) -> str:
    """The comparison as one self-contained HTML file in `folder`, with links to the runs and to `csv`; raises
    `UserError` without matplotlib."""
    names = [group.label for group in comparison.groups]
    result = Page("Comparison of " + (" and ".join(names) if len(names) < 3 else f"{len(names)} groups of runs"))
    result.paragraph(comparison.verdict)
    for remark in comparison.remarks:
        result.paragraph(remark)
    tables = [comparison.results(), comparison.differences(), comparison.pairs(), comparison.runs()]
    pictures = [(picture, figures.png(picture.draw())) for picture in comparison.pictures()]
    for picture, png in pictures[:1]:
        result.figure(png, picture.caption, picture.title)
    for table in tables[:3]:
        if table is not None and table.rows:
            result.heading(table.title)
            result.table(table.columns, table.rows)
    for picture, png in pictures[1:]:
        result.figure(png, picture.caption, picture.title)
    result.heading("Runs")
    runs = comparison.runs()
    result.table(runs.columns, [[_link(Path(path), folder), *row] for path, *row in runs.rows])
    if csv is not None:
        result.links("With all digits:", [_link(csv, folder)])
    result.heading("How to reproduce this")
    result.code(command)
    return result.html()


def _link(path: Path, folder: Path) -> Link:
    """To `path`, from a page in `folder`."""
    return Link(str(path), Path(os.path.relpath(path, folder)).as_posix())
