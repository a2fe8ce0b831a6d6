"""Self-contained HTML pages of text, tables and figures."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

# Styles for phones, dark mode and print. In dark mode, figures are inverted, and colours
# keep their hue. Shadows mark the edges of a table that scrolls.
STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1b1f; --paper: #ffffff; --faint: #5c5f66; --rule: #d5d7dc; --band: #8a8d941a;
  --link: #0b57a4; --shadow: #00000059; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e9; --paper: #17181b; --faint: #a3a6ad; --rule: #3a3c42; --band: #a3a6ad14;
    --link: #8ab8f0; --shadow: #d5d7dc73; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 0.6rem; }
p { max-width: 46rem; overflow-wrap: break-word; }
a { color: var(--link); }
.wide { overflow-x: auto; margin: 1rem 0; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shadow), transparent) 0 0 / 0.9rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shadow), transparent) 100% 0 / 0.9rem 100% no-repeat scroll; }
.wide:focus-visible { outline: 2px solid var(--link); }
.hint { display: none; margin: 1rem 0 -0.6rem; color: var(--faint); font-size: 0.88rem; }
.hint.always { display: block; }
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
@media screen and (prefers-color-scheme: dark) { figure img { filter: invert(0.91) hue-rotate(180deg); } }
figcaption { margin-top: 0.5rem; max-width: 46rem; color: var(--faint); font-size: 0.92rem; }
@media screen and (max-width: 40rem) {
  .hint { display: block; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards, .cards tbody, .cards tr, .cards td { display: block; width: auto; min-width: 0; text-align: left; }
  .cards tr { padding: 0.5rem 0; border-bottom: 1px solid var(--rule); }
  .cards td { padding: 0.15rem 0.75rem; border: 0; white-space: normal; overflow-wrap: anywhere; }
  .cards td::before { content: attr(data-column) ": "; color: var(--faint); }
}
@media print {
  :root { --ink: #000000; --paper: #ffffff; --faint: #444444; --rule: #999999; --band: #f4f5f7; --link: #000000; }
  .hint, .hint.always { display: none; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide, pre { overflow: visible; }
  pre, th, td { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""

LONG = 40
"""minimum characters of a cell that may wrap"""
LETTERS_OF_PHONE, LETTERS_OF_PAGE, LETTERS_BETWEEN = 46, 118, 3
"""characters per row at a width of 390 pixels and at the maximum width, and those of a column gap"""
HINT = "This table is wide: scroll it sideways."
ARXIV = re.compile(r"(?<=arXiv[ :])\d{4}\.\d{4,5}(?:(?:, | and )\d{4}\.\d{4,5})*")
ARXIV_ID = re.compile(r"\d{4}\.\d{4,5}")
NUMERIC = re.compile(r"[-−+<]?\d[-–−+\d.,eE±%\[\] ]*")


@dataclass(frozen=True)
class Link:
    """A link to another file, by its path relative to the page."""

    text: str
    path: str

    def __str__(self) -> str:
        return self.text

    def html(self) -> str:
        """The element."""
        return f'<a href="{escape(quote(self.path))}">{escape(self.text)}</a>'


def marked_up(text: str) -> str:
    """`text` escaped, with arXiv numbers as links."""
    return ARXIV.sub(lambda ids: ARXIV_ID.sub(_paper, ids[0]), escape(text))


def _paper(number: re.Match[str]) -> str:
    return f'<a href="https://arxiv.org/abs/{number[0]}">{number[0]}</a>'


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


class Page:
    """A self-contained HTML page, built from top to bottom; all text is escaped.

    It has no script and loads no other file; links lead to papers and to files in the same folder. It has styles for
    phones, dark mode and print.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        """A section heading."""
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text; arXiv numbers become links."""
        self.parts.append(f"<p>{marked_up(text)}</p>")

    def links(self, text: str, links: Sequence[Link]) -> None:
        """A line of links after `text`."""
        self.parts.append(f"<p>{escape(text)} {', '.join(link.html() for link in links)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of text, links, numbers (right-aligned), bools (yes, no) and None (–).

        On a phone, a table with long texts becomes one card per row; other wide tables scroll, with a hint.
        """
        assert all(len(row) == len(columns) for row in rows), "a row has a cell for each column"
        right = number_columns(columns, rows)
        head = "".join(f"<th{_kind(name, r)}>{escape(name)}</th>" for name, r in zip(columns, right, strict=True))
        body = "\n".join(f"<tr>{_cells(columns, row, right)}</tr>" for row in rows)
        cards = any(len(cell_text(value)) > LONG for row in rows for value in row)
        if not cards:
            self._hint(columns, rows)
        self.parts.append(
            f'<div class="wide" tabindex="0"><table{" class=cards" * cards}>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )

    def _hint(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a hint that a wide table scrolls, on phones or always."""
        widths = [max(map(len, map(cell_text, column))) for column in zip(columns, *rows, strict=True)]
        letters = sum(widths) + LETTERS_BETWEEN * len(columns)
        if letters > LETTERS_OF_PHONE:
            self.parts.append(f'<p class="hint{" always" * (letters > LETTERS_OF_PAGE)}">{HINT}</p>')

    def figure(self, png: bytes, caption: str, alt: str) -> None:
        """An embedded image with a caption and alternative text."""
        data = base64.b64encode(png).decode("ascii")
        self.parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">\n'
            f"<figcaption>{marked_up(caption)}</figcaption></figure>"
        )

    def code(self, text: str) -> None:
        """Preformatted commands or code."""
        self.parts.append(f"<pre><code>{escape(text)}</code></pre>")

    def html(self) -> str:
        """The HTML of the page."""
        parts = "\n".join(self.parts)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<h1>{escape(self.title)}</h1>\n{parts}\n</body>\n</html>\n"
        )


def _cells(columns: Sequence[str], row: Sequence[Any], right: Sequence[bool]) -> str:
    cells = []
    for name, value, to_the_right in zip(columns, row, right, strict=True):
        text = cell_text(value)
        shown = value.html() if isinstance(value, Link) else marked_up(text)
        cells.append(f'<td{_kind(text, to_the_right)} data-column="{escape(name)}">{shown}</td>')
    return "".join(cells)


def _kind(text: str, right: bool) -> str:
    if right:
        return ' class="number"'
    return ' class="long"' if len(text) > LONG else ""
