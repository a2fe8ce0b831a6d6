"""`compare`: runs beside each other, on the terminal, as a page and as a table."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from typing_extensions import Doc

from minitransformer import files
from minitransformer.analysis.compare import X_LABELS, RunComparison, compare
from minitransformer.analysis.comparison_page import comparison_page
from minitransformer.analysis.history import Abscissa
from minitransformer.commands import DONE, parse, run_command
from minitransformer.reporting import plain
from minitransformer.reporting.report import csv_text
from minitransformer.reporting.tables import Table

LEAST_WIDTH, MOST_WIDTH = 40, 120
SMALLEST = Doc(
    "between groups, in the unit of the metric, below which no winner is named; None is 0.002 for losses and bits "
    "per byte, and 0 for other numbers"
)


@dataclass(frozen=True)
class Options:
    """Which runs, and how to show them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; those that differ in their seeds only make one group"""
    by: Abscissa = "step"
    """what the curves run over"""
    metric: str | None = None
    """a number of metrics.jsonl to compare by; None is validation_loss, or bits_per_byte where losses do not compare"""
    smallest_difference: Annotated[float | None, SMALLEST] = None
    html: Path | None = None
    """also write a page, which is one self-contained file"""
    csv: Path | None = None
    """also write a table with one row for each run"""


def main(arguments: Sequence[str]) -> int:
    """Compare; returns the exit code."""
    return run_command(lambda: _compare(arguments))


def _compare(arguments: Sequence[str]) -> int:
    about = "Compare runs: what differs in their settings, how they learned, and which differences the seeds bear out."
    options = parse(Options, arguments, prog="minitransformer compare", description=about)
    comparison = compare(
        options.runs, by=options.by, metric=options.metric, smallest_difference=options.smallest_difference
    )
    columns = shutil.get_terminal_size((80, 24)).columns
    print(_text(comparison, min(max(columns, LEAST_WIDTH), MOST_WIDTH)))
    if options.html is not None:
        command = shlex.join(["python", "-m", "minitransformer", "compare", *arguments])
        _write(
            options.html,
            comparison_page(comparison, command, options.html.parent, options.csv),
            "choose another --html",
        )
    if options.csv is not None:
        _write(options.csv, csv_text(_with_plain_names(comparison.runs())), "choose another --csv")
    return DONE


def _text(comparison: RunComparison, width: int) -> str:
    parts = [_table(comparison.results(), width), _table(comparison.differences(), width)]
    drawn, label = comparison.shown_curves()
    parts.append(plain.plot(drawn, x_label=X_LABELS[comparison.by], y_label=label, width=width))
    if (pairs := comparison.pairs()) is not None:
        parts.append(_table(pairs, width))
    parts += [textwrap.fill(line, width) for line in (*comparison.remarks, comparison.verdict)]
    return "\n\n".join(part for part in parts if part)


def _table(table: Table, width: int) -> str:
    return f"{table.title}\n{plain.plain_table(table.columns, table.rows, width)}" if table.rows else ""


def _with_plain_names(table: Table) -> Table:
    """The table with columns that programs can name: no blanks."""
    return replace(table, columns=[name.replace(" ", "_") for name in table.columns])


def _write(target: Path, content: str, remedy: str) -> None:
    with files.writing(target, remedy):
        files.write_text(target, content)
    print(f"written    {target}")
