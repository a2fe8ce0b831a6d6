"""Plain-text tables and plots for terminals and pipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minitransformer.reporting.figures import Curve
from minitransformer.reporting.tables import Table, cell_text, number_columns

MARKS = "ox+*#@%&$~"
GAP = 2


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = 80) -> str:
    """A table in lines of at most `width` characters.

    Columns that do not fit follow in a block below, which repeats the first column; a cell that does not fit is
    truncated with an ellipsis.
    """
    right = number_columns(columns, rows)
    most = max(8, (width - GAP) // 2)
    cells = [[_cut(cell_text(value), most) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    blocks = []
    for chosen in _blocks(widths, width):
        lines = [_line([(row[i], widths[i], right[i]) for i in chosen]) for row in cells]
        rule = "-" * (sum(widths[i] for i in chosen) + GAP * (len(chosen) - 1))
        blocks.append("\n".join([lines[0], rule, *lines[1:]]))
    return "\n\n".join(blocks)


def titled_table(table: Table, width: int = 80) -> str:
    """The table below its title; "" without rows."""
    return f"{table.title}\n{plain_table(table.columns, table.rows, width)}" if table.rows else ""


def plot(curves: Sequence[Curve], *, x_label: str, y_label: str, width: int = 80, height: int = 16) -> str:
    """A plot of the means of the curves, with one character each; "" with fewer than two points."""
    points = [(np.asarray(curve.x, dtype=float), np.asarray(curve.mean, dtype=float)) for curve in curves]
    finite = [(x[np.isfinite(x + y)], y[np.isfinite(x + y)]) for x, y in points]
    xs, ys = np.concatenate([x for x, _ in finite] or [[]]), np.concatenate([y for _, y in finite] or [[]])
    if xs.size < 2 or np.ptp(xs) == 0:
        return ""
    bottom, top = _limits(ys)
    axis = [f"{top:.4g}", f"{bottom:.4g}"]
    margin = max(len(label) for label in axis)
    columns = width - margin - 2
    grid = np.full((height, columns), " ")
    at = np.linspace(xs.min(), xs.max(), columns)
    for column in range(columns):
        # Overlapping curves are drawn alternately.
        for i in np.roll(np.arange(len(finite)), column):
            x, y = finite[i]
            if x.size and x.min() <= at[column] <= x.max():
                share = (np.interp(at[column], x, y) - bottom) / (top - bottom)
                grid[round((1 - share) * (height - 1)), column] = MARKS[i % len(MARKS)]
    labels = [axis[0], *[""] * (height - 2), axis[1]]
    lines = [f"{label:>{margin}} |{''.join(row)}".rstrip() for label, row in zip(labels, grid, strict=True)]
    ends = f"{xs.min():g}", f"{xs.max():g}"
    lines += [" " * margin + " +" + "-" * columns]
    lines += [" " * (margin + 2) + ends[0] + x_label.center(columns - len(ends[0]) - len(ends[1])) + ends[1]]
    key = [f"  {MARKS[i % len(MARKS)]} {curve.label}" for i, curve in enumerate(curves)]
    return "\n".join([y_label, *lines, *key])


def _limits(ys: np.ndarray) -> tuple[float, float]:
    """The ends of the axis, distinct even for constant values."""
    low, high = float(ys.min()), float(ys.max())
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _cut(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _blocks(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """The columns of each block: the first, and as many others as fit."""
    block, used = [0], widths[0]
    for i in range(1, len(widths)):
        if len(block) > 1 and used + GAP + widths[i] > width:
            yield block
            block, used = [0], widths[0]
        block.append(i)
        used += GAP + widths[i]
    yield block


def _line(cells: Sequence[tuple[str, int, bool]]) -> str:
    aligned = [f"{text:>{width}}" if right else f"{text:<{width}}" for text, width, right in cells]
    return (" " * GAP).join(aligned).rstrip()
