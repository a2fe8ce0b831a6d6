"""What a report shows: tables, and pictures that are drawn where somebody wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table of the report, and a CSV file of its own; cells are text, numbers or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A figure of the report, and a PNG file of its own; `draw` imports matplotlib."""

    title: str
    draw: Callable[[], Figure]
    caption: str = ""
