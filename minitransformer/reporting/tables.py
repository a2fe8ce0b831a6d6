"""Tables with their cells as text, and pictures that are drawn on demand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMERIC = re.compile(r"[-−+<]?\d[-–−+\d.,eE±%\[\] ]*")


@dataclass(frozen=True)
class Table:
    """A table of a report, also written as CSV; cells are text, numbers or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A figure of a report, also written as PNG; `draw` imports matplotlib."""

    title: str
    draw: Callable[[], Figure]
    caption: str = ""


def cell_text(value: Any) -> str:
    """`value` as text in a table: yes, no, – for None, four significant digits for a float."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return number_text(float(value))
    return str(value)


def number_text(value: float) -> str:
    """`value` with four significant digits, in scientific notation below 0.001 and from 100,000."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.4g}")
    if rounded and not 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:.3e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{rounded:.{decimals}f}"


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return NUMERIC.fullmatch(value) is not None
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def number_columns(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Whether each column is numeric except for gaps; texts such as 1.2 ± 0.3 and 5 [4, 6] are numeric."""
    values = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    return [bool(column) and all(_is_number(value) for value in column) for column in values]
