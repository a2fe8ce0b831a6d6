"""Pages of words, tables and figures: each is one HTML file that opens from disk, without a network."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

# Phones, dark rooms and printers each get their own; figures keep their white paper everywhere.
STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1b1f; --paper: #ffffff; --faint: #5c5f66; --rule: #d5d7dc; --band: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e9; --paper: #17181b; --faint: #a3a6ad; --rule: #3a3c42; --band: #212329; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 0.6rem; }
p { max-width: 46rem; overflow-wrap: break-word; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
.long { white-space: normal; min-width: 16rem; }
th { border-bottom: 2px solid var(--faint); vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); }
.number { text-align: right; }
pre { overflow-x: auto; padding: 0.75rem 1rem; background: var(--band); border-radius: 4px; font-size: 0.88rem; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { margin-top: 0.5rem; max-width: 46rem; color: var(--faint); font-size: 0.92rem; }
@media print {
  :root { --ink: #000000; --paper: #ffffff; --faint: #444444; --rule: #999999; --band: #f4f5f7; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide, pre { overflow: visible; }
  pre, th, td { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""

LONG = 40
"""letters of a cell from which on it may break into lines"""
NUMERIC = re.compile(r"[-−+<]?\d[-–−+\d.,eE±%\[\] ]*")


def cell_text(value: Any) -> str:
    """How a table shows `value`: yes, no, – for None, four significant digits for what is no integer, or its text."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return number_text(float(value))
    return str(value)


def number_text(value: float) -> str:
    """`value` with four significant digits; in powers of ten where it is below 0.001, or 100,000 and more."""
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
    """For each column, whether it holds numbers only, beside gaps; texts such as 1.2 ± 0.3 and 5 [4, 6] are some."""
    values = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
    return [bool(column) and all(_is_number(value) for value in column) for column in values]


class Page:
    """One self-contained HTML file, built from top to bottom; every text is escaped.

    It has no script and no reference to another file, reads on a phone, in a dark room and on paper.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        """A heading of a section."""
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self.parts.append(f"<p>{escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of text, numbers (to the right), truth values (yes, no) and None (–)."""
        assert all(len(row) == len(columns) for row in rows), "a row has a cell for each column"
        right = number_columns(columns, rows)
        head = _cells("th", columns, right)
        body = "\n".join(f"<tr>{_cells('td', [cell_text(value) for value in row], right)}</tr>" for row in rows)
        self.parts.append(
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
        )

    def figure(self, png: bytes, caption: str, alt: str) -> None:
        """A picture within the page, with a caption and the words that stand for it where it cannot be seen."""
        data = base64.b64encode(png).decode("ascii")
        self.parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">\n'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def code(self, text: str) -> None:
        """Commands or code, letter by letter."""
        self.parts.append(f"<pre><code>{escape(text)}</code></pre>")

    def html(self) -> str:
        """The whole file."""
        parts = "\n".join(self.parts)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<h1>{escape(self.title)}</h1>\n{parts}\n</body>\n</html>\n"
        )


def _cells(tag: str, texts: Sequence[str], right: Sequence[bool]) -> str:
    return "".join(f"<{tag}{_kind(text, r)}>{escape(text)}</{tag}>" for text, r in zip(texts, right, strict=True))


def _kind(text: str, right: bool) -> str:
    if right:
        return ' class="number"'
    return ' class="long"' if len(text) > LONG else ""
