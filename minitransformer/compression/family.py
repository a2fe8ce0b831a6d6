"""A run and all that were made from it, by compression and by fine-tuning, with their sizes and their quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minitransformer.compression.making import RECORD, Source
from minitransformer.compression.measuring import ModelFigures, QualityData, quality_figures, stored_bytes
from minitransformer.compression.request import CompressionRequest
from minitransformer.errors import UserError
from minitransformer.records import read_json
from minitransformer.runs import Run
from minitransformer.runs.layout import CONFIG
from minitransformer.settings import with_settings


@dataclass(frozen=True)
class Member:
    """A run, and how it was made from the `origin`, which is another one."""

    path: Path
    origin: Path
    methods: tuple[str, ...]
    """of all compressions from the first run to this one"""
    is_tuned: bool
    """whether it was trained after that"""


def members_beside(folder: Path, source: Path, report: Callable[[str], None]) -> list[Member]:
    """All runs in `folder` that were made from the run `source`, each after its origin.

    Those that cannot be read are left out, as `report` is told.
    """
    origins: dict[Path, tuple[Path, str | None]] = {}
    for path in sorted(config.parent for config in folder.glob(f"*/{CONFIG}")):
        try:
            if (found := _origin(path)) is not None:
                origins[path] = found
        except UserError as error:
            report(f"{path} is left out: {error}")
    first = Member(source, source, (), is_tuned=False)
    return list(_made_from(first, {path.resolve() for path in (source,)}, origins))


def _made_from(member: Member, seen: set[Path], origins: Mapping[Path, tuple[Path, str | None]]) -> Iterator[Member]:
    for path, (origin, method) in origins.items():
        if path.resolve() in seen or not _is_same(origin, path, member.path):
            continue
        seen.add(path.resolve())
        made = Member(path, member.path, member.methods + ((method,) if method else ()), is_tuned=method is None)
        yield made
        yield from _made_from(made, seen, origins)


def _origin(path: Path) -> tuple[Path, str | None] | None:
    """The run that the one at `path` was made from, and the compression; None for one that was fine-tuned."""
    if (record := path / RECORD).is_file():
        made = read_json(record, "remove it")
        request = with_settings(CompressionRequest(), made["settings"]).compression
        return Path(made["run"]), request.method.make().label
    parent = Run.open(path).parent
    return None if parent is None else (Path(parent.path), None)


def _is_same(written: Path, beside: Path, run: Path) -> bool:
    """Whether `run` is the one that was `written` down by a run that is `beside` it, or was when both moved."""
    return run.resolve() in (written.resolve(), (beside.parent / written.name).resolve())


def measured_members(
    members: list[Member],
    source: Source,
    held_out: QualityData,
    report: Callable[[str], None],
    advance: Callable[[], object],
) -> dict[Path, ModelFigures]:
    """The size and the quality of `source` and of all `members` that can be measured on the same data, by path."""
    model = source.model()
    original = held_out.nats(model, advance)
    figures = quality_figures(original, original, held_out.divisor)
    found = {source.run.path: ModelFigures(stored_bytes(model), model.num_parameters(), **figures)}
    for member in members:
        try:
            run = Run.open(member.path)
            if run.config.model.topology != source.config.model.topology:
                raise UserError(f"topology {run.config.model.topology!r} has no {held_out.unit} on the same data")
            model = run.load_model()
        except UserError as error:
            report(f"{member.path} is left out: {error}")
            continue
        figures = quality_figures(held_out.nats(model, advance), original, held_out.divisor)
        found[member.path] = ModelFigures(stored_bytes(model), model.num_parameters(), **figures)
    return found
