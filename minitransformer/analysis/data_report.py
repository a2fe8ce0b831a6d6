"""The report on cleaned data, as tables for a terminal and as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitransformer.amounts import size
from minitransformer.errors import UserError
from minitransformer.files import write_text
from minitransformer.reporting.pages import Page
from minitransformer.reporting.report import add_table
from minitransformer.reporting.tables import Table

TITLE = "Data"
EXAMPLES = 5
"""removed documents that are shown for each reason"""


def tables_of(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary, without those that would be empty."""
    tables = [_sizes(summary), _removed(summary), _personal(summary), _changed(summary), _held_out(summary)]
    tables += [_lengths(summary), _scripts(summary), _repeated(summary)]
    return [table for table in tables if table.rows]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"


def _sizes(summary: Mapping[str, Any]) -> Table:
    before, after = summary["before"], summary["after"]
    rows: list[Sequence[Any]] = [
        (name, f"{before[name]:,}", f"{after[name]:,}", _share(after[name], before[name])) for name in before
    ]
    if (tokens := summary["tokens_per_byte"]) is not None:
        rows.append(("tokens per byte", f"{tokens['value']:.4f}", None, None))
    return Table("Before and after", ("", "before", "after", "kept"), rows)


def _removed(summary: Mapping[str, Any]) -> Table:
    documents = summary["before"]["documents"]
    rows = [
        (each["reason"], f"{each['documents']:,}", _share(each["documents"], documents), size(each["bytes"]))
        for each in summary["removed"]
    ]
    return Table("Removed", ("reason", "documents", "share", "size"), rows)


def _personal(summary: Mapping[str, Any]) -> Table:
    columns = ("kind", "found", "documents", "documents kept", "masked")
    keys = ("kind", "found", "documents", "documents_kept", "masked")
    return Table("Personal data", columns, [[each[key] for key in keys] for each in summary["personal"]])


def _changed(summary: Mapping[str, Any]) -> Table:
    rows = [(name, f"{count:,}") for name, count in summary["changed"].items()]
    return Table("Normalised", ("normalisation", "documents changed"), rows)


def _held_out(summary: Mapping[str, Any]) -> Table:
    found = summary["held_out"]
    if found is None:
        return Table("", (), ())
    shares = (("some", "sharing_any"), ("half", "sharing_half"), ("all", "sharing_all"))
    rows = [
        (f"{what} of the {found['words']}-grams", f"{found[key]:,}", _share(found[key], found["documents"]))
        for what, key in shares
    ]
    return Table("Held-out documents in these data", ("in them stand", "documents", "share"), rows)


def _lengths(summary: Mapping[str, Any]) -> Table:
    rows = [
        (f"{name}, {when}", *(f"{value:,}" for value in values.values()))
        for name, both in summary["lengths"].items()
        for when, values in both.items()
        if values
    ]
    shares = next(iter(summary["lengths"].values()))["before"]
    return Table("Lengths of documents, by quantile", ("", *shares), rows)


def _scripts(summary: Mapping[str, Any]) -> Table:
    total = sum(each["characters"] for each in summary["scripts"])
    rows = [
        (each["script"], _share(each["characters"], total), f"{each['documents']:,}", f"{each['documents_kept']:,}")
        for each in summary["scripts"]
    ]
    return Table("Scripts", ("script", "characters", "documents mainly in it", "of these kept"), rows)


def _repeated(summary: Mapping[str, Any]) -> Table:
    rows = [(f"{each['file']}:{each['document']}", f"{each['repeated']:,}") for each in summary["duplicates"]]
    return Table("Most repeated documents", ("first copy", "further copies"), rows)


def data_page(summary: Mapping[str, Any], removed: Path | None = None) -> str:
    """The HTML of the report; with examples from the file of what was `removed`."""
    page = Page(f"{TITLE}: {', '.join(summary['data'])}")
    before, after = summary["before"], summary["after"]
    files = f"{summary['files']:,} file{'s' * (summary['files'] > 1)}"
    page.paragraph(
        f"{before['documents']:,} documents in {files}, of {size(before['bytes'])}. "
        f"{'Cleaning keeps' if removed is None else 'Cleaning has kept'} {after['documents']:,} of them, of "
        f"{size(after['bytes'])} ({_share(after['bytes'], before['bytes'])})."
    )
    for table in tables_of(summary):
        add_table(page, table)
    if removed is not None and (rows := list(_examples(removed))):
        add_table(page, Table("Examples of what was removed", ("reason", "document", "beginning"), rows))
    page.heading("Settings")
    page.code(json.dumps(summary["settings"], indent=2, ensure_ascii=False))
    return page.html()


def _examples(removed: Path) -> Iterator[tuple[str, str, str]]:
    """The first removed documents of each reason."""
    shown: dict[str, int] = {}
    with removed.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            shown[entry["reason"]] = shown.get(entry["reason"], 0) + 1
            if shown[entry["reason"]] <= EXAMPLES:
                yield entry["reason"], f"{entry['file']}:{entry['document']}", entry["text"]


def write_report(path: Path, text: str) -> None:
    """Write a file of the report; raises `UserError` where it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None
