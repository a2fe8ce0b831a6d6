"""What is asked of predictions: metrics of all items, of groups, beside another run, and of counterfactual texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minitransformer.amounts import counted
from minitransformer.evaluation.class_report import ClassReport
from minitransformer.evaluation.counterfactuals import Change, Sensitivity, Variant, sensitivity
from minitransformer.evaluation.estimates import (
    SMALL,
    Estimate,
    Gap,
    PairedDifference,
    by_value,
    estimates_of,
    largest_gaps,
    paired_differences,
)
from minitransformer.evaluation.intervals import Bounds
from minitransformer.evaluation.items import Items
from minitransformer.evaluation.metrics import Metric, metric_text
from minitransformer.reporting.tables import Picture, Table
from minitransformer.runs.predicting import EvaluatedPart

ALL = "all"
INTERVAL = "95% interval"
CLEAR = "A difference is clear if its interval excludes 0."
MOST_WORDS = 12
"""exchanges of words that are told one by one"""


def metric_rows(estimates: Mapping[str, Estimate]) -> list[list[str | None]]:
    """A row for each metric: its title, its value and its interval."""
    return [
        [Metric.named(name).title, metric_text(name, each.value), ends_text(name, each.interval)]
        for name, each in estimates.items()
    ]


def metric_table(title: str, estimates: Mapping[str, Estimate]) -> Table:
    """The metrics of one part."""
    return Table(title, ("metric", "value", INTERVAL), metric_rows(estimates))


def ends_text(name: str, bounds: Bounds | None) -> str | None:
    """An interval in the metric's own format."""
    return None if bounds is None else " to ".join(metric_text(name, end) for end in bounds)


def estimate_text(name: str, each: Estimate) -> str:
    """A value with its interval in brackets."""
    ends = "" if each.interval is None else f" [{', '.join(metric_text(name, end) for end in each.interval)}]"
    return metric_text(name, each.value) + ends


@dataclass
class Section:
    """A part of a report: tables, what is to be said of them, and the same as JSON."""

    name: str
    """in JSON"""
    tables: list[Table]
    notes: list[str]
    record: Any
    pictures: list[Picture] = field(default_factory=list)
    """for a page"""


@dataclass(frozen=True)
class Found:
    """What an evaluation has found: sections for a terminal, a page and JSON, and rows for each item."""

    sections: list[Section]
    record: dict[str, Any]
    parts: Sequence[EvaluatedPart]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each item of the last part, which has the predictions if there are any."""
        last = self.parts[-1]
        return (last.describe(place) for place in range(len(last.items)))


def metric_section(part: EvaluatedPart, estimates: Mapping[str, Estimate], notes: Sequence[str] = ()) -> Section:
    """The metrics of one part."""
    return Section(
        part.name,
        [metric_table(part.title, estimates)],
        list(notes),
        {"items": len(part.items), **estimates_json(estimates)},
    )


def class_section(report: ClassReport) -> Section:
    """What is known of each class."""
    (head, *rows), (names, *counts) = report.rows(), report.confusion_rows()
    tables = [
        Table("Classes, with 95% intervals", head, rows),
        Table("Texts by label and predicted class", names, counts),
    ]
    return Section("classes", tables, [], report.to_json())


@dataclass(frozen=True)
class Grouped:
    """The items of a part by the values of a column: the metrics of each group, and the largest gaps between them."""

    column: str
    part: EvaluatedPart
    sizes: Mapping[str, int]
    groups: Mapping[str, Mapping[str, Estimate]]
    gaps: Mapping[str, Gap]

    def named(self, group: str) -> str:
        """The name of a group, which says whether it is small."""
        return f"{group} (small)" if self.sizes[group] < SMALL else group

    def gap_table(self, rows: Sequence[Sequence[Any]]) -> Table:
        """The largest gaps."""
        columns = ("metric", f"gap, {INTERVAL}", "from, to")
        return Table(f"Largest gap between values of {self.column}", columns, rows)

    def tables(self) -> list[Table]:
        """A row for each group, and one for the largest gap of each metric."""
        names = list(dict.fromkeys(name for of in self.groups.values() for name in of))
        titles = [Metric.named(name).title for name in names]
        rows: list[list[Any]] = [
            [self.named(group), f"{self.sizes[group]:,}"]
            + [estimate_text(name, of[name]) if name in of else None for name in names]
            for group, of in self.groups.items()
        ]
        gaps = [
            [Metric.named(name).title, estimate_text(name, each.gap), f"{each.lowest} to {each.highest}"]
            for name, each in self.gaps.items()
        ]
        title = f"{self.part.title}, by {self.column}"
        return [Table(title, (self.column, "items", *titles), rows), self.gap_table(gaps)]

    @property
    def notes(self) -> list[str]:
        """What is to be known of small groups, and of gaps."""
        small = [group for group, size in self.sizes.items() if size < SMALL]
        notes = []
        if small:
            which = f"{len(small)} of {len(self.sizes)} groups are" if len(small) > 1 else f"{small[0]} is"
            notes.append(f"{which} small (fewer than {SMALL} items): too few to be compared, and in no gap.")
        clear = "A gap is clear if its interval excludes 0."
        notes.append(clear if self.gaps else f"A gap needs two groups of at least {SMALL} items.")
        return notes

    def section(self) -> Section:
        """Its tables and notes."""
        return Section(f"{self.part.name}_by_group", self.tables(), self.notes, self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "column": self.column,
            "values": {
                group: {"items": size, "small": size < SMALL, **estimates_json(self.groups[group])}
                for group, size in self.sizes.items()
            },
            "gaps": {name: gap.to_json() for name, gap in self.gaps.items()},
        }


def estimates_json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Each metric with its value and its interval."""
    return {name: each.to_json() for name, each in estimates.items()}


def grouped(part: EvaluatedPart, column: str, labels: Sequence[str]) -> Grouped:
    """The part by the value in `column` of each number of the data."""
    return of_groups(part, column, dict(by_value(part.of(labels), part.items)))


def of_groups(part: EvaluatedPart, column: str, groups: Mapping[str, Items]) -> Grouped:
    """The part by the values of `column`, of which each has items of its own."""
    sizes = {group: len(items) for group, items in groups.items()}
    estimates = {group: estimates_of(items) for group, items in groups.items()}
    return Grouped(column, part, sizes, estimates, largest_gaps(groups))


def difference_table(title: str, heading: str, rows: Sequence[tuple[str, str, PairedDifference]]) -> Table:
    """Two runs side by side: what is compared, its metric, and the difference."""
    columns = (heading, "this run", "other run", f"difference, {INTERVAL}", "clear")
    cells: list[list[Any]] = []
    for label, name, each in rows:
        values = (metric_text(name, each.first), metric_text(name, each.second), estimate_text(name, each.difference))
        cells.append([label, *values, each.is_clear])
    return Table(title, columns, cells)


def against_section(part: EvaluatedPart, other: EvaluatedPart, name: str, left_out: int) -> Section:
    """The paired differences of this run and the one called `name` on the same items, without those `left_out`."""
    differences = paired_differences(part.items, other.items)
    record = {"items": len(part.items), **{metric: each.to_json() for metric, each in differences.items()}}
    rows = [(Metric.named(metric).title, metric, each) for metric, each in differences.items()]
    notes = [CLEAR, *([f"{left_out:,} items are left out, which only this run has read."] if left_out else [])]
    title = f"Beside {name}, on the same {counted(len(part.items), 'items')}"
    return Section(f"{part.name}_against", [difference_table(title, "metric", rows)], notes, record)


def sensitivity_table(title: str, found: Sequence[Sensitivity]) -> Table:
    """How often and how much predictions change by exchanged words."""
    rows: list[list[Any]] = []
    for each in found:
        name = f"{each.name} (small)" if each.is_small else each.name
        rows.append([name, f"{each.texts:,}", f"{each.variants:,}", share_text(each.changed), share_text(each.amount)])
        rows[-1].append(_largest_shift(each.shift))
    columns = ("exchange", "texts", "variants", "answer changes", "by how much", "largest mean shift")
    shown = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return Table(title, columns[:shown], [row[:shown] for row in rows])


def counterfactual_section(changes: Sequence[tuple[Variant, Change]], classes: Sequence[str]) -> Section:
    """How predictions change by exchanged words: of each kind, and of the exchanges that change most."""
    of_kinds: dict[str, list[tuple[Variant, Change]]] = {ALL: list(changes)}
    of_words: dict[str, list[tuple[Variant, Change]]] = {}
    for variant, change in changes:
        of_kinds.setdefault(variant.exchange.kind, []).append((variant, change))
        pair = f"{variant.exchange.word} → {variant.exchange.other}"
        of_words.setdefault(pair, []).append((variant, change))
    kinds = [sensitivity(name, some, classes) for name, some in of_kinds.items()]
    words = [sensitivity(name, some, classes) for name, some in of_words.items()]
    most = sorted((each for each in words if not each.is_small), key=lambda each: -each.amount.value)[:MOST_WORDS]
    tables = [sensitivity_table("Answers to the same texts with one word exchanged", kinds)]
    if most:
        tables.append(sensitivity_table("Exchanges that change most, of those in 30 texts or more", most))
    record = {
        "kinds": {each.name: each.to_json() for each in kinds},
        "words": {each.name: each.to_json() for each in words},
    }
    return Section("counterfactuals", tables, [], record)


def share_text(each: Estimate) -> str:
    """A share in per cent with its interval in brackets."""
    ends = "" if each.interval is None else " [{:.1%}, {:.1%}]".format(*each.interval)
    return f"{each.value:.1%}{ends}"


def _largest_shift(shift: Mapping[str, Estimate]) -> str | None:
    """The class whose mean probability rises most, and by how much."""
    if not shift:
        return None
    name = max(shift, key=lambda each: shift[each].value)
    ends = shift[name].interval
    return f"{name} {shift[name].value:+.3f}" + ("" if ends is None else " [{:+.3f}, {:+.3f}]".format(*ends))
