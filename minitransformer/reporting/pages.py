"""Self-contained HTML pages of text, tables and figures: what `page.html` shows."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from minitransformer.reporting.tables import cell_text, number_columns

if TYPE_CHECKING:
    from jinja2 import Environment

LONG = 40
"""characters of a cell from which on those of its column may wrap"""
LETTERS_OF_PHONE, LETTERS_OF_PAGE, LETTERS_BETWEEN = 46, 118, 3
"""characters per row at a width of 390 pixels and at the maximum width, and those of a column gap"""
HINT = "This table is wide: scroll it sideways."
ARXIV = re.compile(r"(?<=arXiv[ :])\d{4}\.\d{4,5}(?:(?:, | and )\d{4}\.\d{4,5})*")
ARXIV_ID = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Link:
    """A link to another file, by its path relative to the page."""

    text: str
    path: str

    def __str__(self) -> str:
        return self.text

    def __html__(self) -> str:
        from markupsafe import escape

        return f'<a href="{escape(quote(self.path))}">{escape(self.text)}</a>'


@cache
def templates() -> Environment:
    """The templates of all pages: those here, and those of `look`."""
    from jinja2 import Environment, FileSystemLoader

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent]), autoescape=True, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["linked"] = linked
    return environment


def linked(text: str | Link) -> Any:
    """`text` escaped, with arXiv numbers as links."""
    from markupsafe import Markup, escape

    paper = r'<a href="https://arxiv.org/abs/\g<0>">\g<0></a>'
    return text if isinstance(text, Link) else Markup(ARXIV.sub(lambda ids: ARXIV_ID.sub(paper, ids[0]), escape(text)))


class Page:
    """A self-contained HTML page, built from top to bottom; all text is escaped.

    It has no script and loads no other file; links lead to papers and to files in the same folder. It has styles for
    phones, dark mode and print.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        """A section heading."""
        self.parts.append({"kind": "heading", "text": text})

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text; arXiv numbers become links."""
        self.parts.append({"kind": "paragraph", "text": text})

    def links(self, text: str, links: Sequence[Link]) -> None:
        """A line of links after `text`."""
        self.parts.append({"kind": "links", "text": text, "links": links})

    def code(self, text: str) -> None:
        """Preformatted commands or code."""
        self.parts.append({"kind": "code", "text": text})

    def figure(self, png: bytes, caption: str, alt: str) -> None:
        """An embedded image with a caption and alternative text."""
        data = base64.b64encode(png).decode("ascii")
        self.parts.append({"kind": "figure", "data": data, "caption": caption, "alt": alt})

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of text, links, numbers (right-aligned), bools (yes, no) and None (–).

        On a phone, a table with long texts becomes one card per row; other wide tables scroll, with a hint.
        """
        assert all(len(row) == len(columns) for row in rows), "a row has a cell for each column"
        cells = [[value if isinstance(value, Link) else cell_text(value) for value in row] for row in rows]
        cards = any(len(str(cell)) > LONG for row in cells for cell in row)
        widths = [max(len(str(cell)) for cell in column) for column in zip(columns, *cells, strict=True)]
        letters = sum(widths) + LETTERS_BETWEEN * len(columns)
        hint = "hint" + " always" * (letters > LETTERS_OF_PAGE) if letters > LETTERS_OF_PHONE and not cards else ""
        long = [max(len(str(cell)) for cell in column) > LONG for column in zip(columns, *cells, strict=True)]
        table = {"columns": columns, "rows": cells, "right": number_columns(columns, rows), "long": long}
        self.parts.append({"kind": "table", **table, "cards": cards, "hint": hint})

    def html(self) -> str:
        """The HTML of the page."""
        template = templates().get_template("page.html")
        return template.render(title=self.title, parts=self.parts, hint=HINT)
