"""The table and the plot of a run and all that were made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from minitransformer import files
from minitransformer.amounts import size
from minitransformer.commands import note, table_width
from minitransformer.compression.family import Member, measured_members, members_beside
from minitransformer.compression.making import Source
from minitransformer.compression.measuring import ModelFigures, QualityData
from minitransformer.reporting import figures
from minitransformer.reporting.figures import Point
from minitransformer.reporting.plain import plain_table

WHOLE = "not compressed"


def draw_family(source: Source, held_out: QualityData, beside: Path, plot: Path) -> None:
    """Measure the run `source` and all that were made from it, `beside` another one; a table, and the file `plot`."""
    first = Member(source.run.path, source.run.path, (), is_tuned=False)
    members = members_beside(beside.absolute().parent, source.run.path, note)
    total = (1 + len(members)) * len(held_out.batches)
    with tqdm(total=total, desc="measuring", disable=None, leave=False) as bar:
        found = measured_members(members, source, held_out, note, bar.update)
    shown = [member for member in (first, *members) if member.path in found]
    rows = [_row(member, found[member.path]) for member in shown]
    unit = held_out.unit
    print(f"\n{plain_table(['run', 'size', unit, 'change', 'made by'], rows, table_width())}")
    image = figures.named_points(
        _points(shown, found),
        x_label="size of the weights (MB)",
        y_label=unit,
        title=f"What was made from {source.run.path.name}. Bars are 95% intervals of the change, on the same "
        "validation data.",
        line=source.run.path.name,
        filled="after fine-tuning",
    )
    with files.writing(plot, "choose another --plot"), files.whole_file(plot) as file:
        file.write(figures.png(image))
    print(f"plot       {plot}")


def _row(member: Member, figures: ModelFigures) -> list[str | None]:
    change = None
    if member.path != member.origin:
        change = with_interval(figures.change, figures.change_low, figures.change_high, "+.2%")
    quality = None if figures.quality is None else f"{figures.quality:.3f}"
    return [member.path.name, size(figures.bytes), quality, change, _made_by(member)]


def _made_by(member: Member) -> str | None:
    return ", ".join((*member.methods, *(["fine-tuning"] if member.is_tuned else []))) or None


def _points(shown: Sequence[Member], found: Mapping[Path, ModelFigures]) -> list[Point]:
    """Intervals are those of the change: the quality of the first is exact beside them."""
    places = {member.path: (found[member.path].bytes / 1e6, found[member.path].quality or 0.0) for member in shown}
    (_, whole), points = places[shown[0].path], []
    for member in shown:
        each = found[member.path]
        low, high = (None if end is None else whole * (1 + end) for end in (each.change_low, each.change_high))
        curve = ", ".join(member.methods) or WHOLE
        origin = places.get(member.origin) if member.is_tuned else None
        points.append(Point(curve, member.path.name, *places[member.path], low, high, origin))
    return points


def with_interval(value: float | None, low: float | None, high: float | None, form: str) -> str | None:
    """A value with its interval, if they are known."""
    if value is None:
        return None
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"
