"""`compare`: compare runs on the terminal, as an HTML page and as a CSV table."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from minitransformer import files
from minitransformer.analysis.compare import X_LABELS, RunComparison, compare, comparison_page
from minitransformer.analysis.history import Abscissa
from minitransformer.commands import DONE, SMALLEST, check_outputs, parse, table_width, with_exit_code
from minitransformer.reporting import plain
from minitransformer.reporting.report import csv_text
from minitransformer.reporting.tables import Table


@dataclass(frozen=True)
class Options:
    """Which runs to compare, and how to show them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; runs that differ only in their seeds form a group"""
    by: Abscissa = "step"
    """x-axis of the training curves"""
    metric: str | None = None
    """metric in metrics.jsonl to compare by; None is validation_loss, or bits_per_byte if tokenizers differ"""
    smallest_difference: Annotated[float | None, SMALLEST] = None
    html: Path | None = None
    """also write a self-contained HTML page"""
    csv: Path | None = None
    """also write a CSV table with one row per run"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Compare; returns the exit code."""
    about = "Compare runs: their settings, their training curves, and which differences are significant across seeds."
    options = parse(Options, arguments, prog="minitransformer compare", description=about)
    check_outputs({"--html": options.html, "--csv": options.csv}, new=False)
    comparison = compare(
        options.runs, by=options.by, metric=options.metric, smallest_difference=options.smallest_difference
    )
    print(_text(comparison, table_width()))
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
    parts = [plain.titled_table(comparison.results(), width), plain.titled_table(comparison.differences(), width)]
    drawn, label = comparison.shown_curves()
    parts.append(plain.plot(drawn, x_label=X_LABELS[comparison.by], y_label=label, width=width))
    if (pairs := comparison.pairs()) is not None:
        parts.append(plain.titled_table(pairs, width))
    parts += [textwrap.fill(line, width) for line in (*comparison.remarks, comparison.verdict)]
    return "\n\n".join(part for part in parts if part)


def _with_plain_names(table: Table) -> Table:
    """The table with column names without spaces, for programs."""
    return replace(table, columns=[name.replace(" ", "_") for name in table.columns])


def _write(target: Path, content: str, remedy: str) -> None:
    with files.writing(target, remedy):
        files.write_text(target, content)
    print(f"written    {target}")
