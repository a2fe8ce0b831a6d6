"""A run and all that were made from it, by compression, distillation and fine-tuning: their sizes and their quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minitransformer.compression.making import RECORD, Source
from minitransformer.compression.measuring import ModelFigures, QualityData, quality_figures, stored_bytes
from minitransformer.errors import UserError
from minitransformer.records import checked_value, read_json
from minitransformer.runs import Run
from minitransformer.runs.layout import CONFIG
from minitransformer.training.weights import Parent


@dataclass(frozen=True)
class Member:
    """A run, and how it was made from the `origin`, which is another one."""

    path: Path
    origin: Path
    methods: tuple[str, ...]
    """of all compressions, and "distilled", from the first run to this one"""
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
    return list(_made_from(first, {source.resolve()}, origins))


def _made_from(member: Member, seen: set[Path], origins: Mapping[Path, tuple[Path, str | None]]) -> Iterator[Member]:
    for path, (origin, method) in origins.items():
        if path.resolve() in seen or not _is_same(origin, path, member.path):
            continue
        seen.add(path.resolve())
        made = Member(path, member.path, member.methods + ((method,) if method else ()), is_tuned=method is None)
        yield made
        yield from _made_from(made, seen, origins)


def _origin(path: Path) -> tuple[Path, str | None] | None:
    """The run that the one at `path` was made from, and how; without a word for one that was fine-tuned.

    A run from scratch with a teacher was made from that; None for other runs from scratch.
    """
    if (record := path / RECORD).is_file():
        made = read_json(record, "remove it")
        settings = checked_value(made.get("settings"), dict, "settings", str(record))
        label = made.get("label", settings.get("method"))  # older records have none
        wanted = {"run": made.get("run"), "label": label}
        run, label = (checked_value(value, str, name, str(record)) for name, value in wanted.items())
        return Path(run), label
    made = read_json(path / CONFIG, "restore it")
    if (parent := Parent.from_json(made.get("parent"), str(path / CONFIG))) is not None:
        return Path(parent.path), None
    training = checked_value(made.get("training", {}), dict, "training", str(path / CONFIG))
    teacher = checked_value(training.get("teacher"), str | None, "teacher", str(path / CONFIG))
    return None if teacher is None else (Path(teacher), "distilled")


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
            _check_comparable(run, source)
            model = run.load_model()
        except UserError as error:
            report(f"{member.path} is left out: {error}")
            continue
        figures = quality_figures(held_out.nats(model, advance), original, held_out.divisor)
        found[member.path] = ModelFigures(stored_bytes(model), model.num_parameters(), **figures)
    return found


def _check_comparable(run: Run, source: Source) -> None:
    """Raises `UserError` for a model that cannot be measured on the data of `source` as its own is."""
    own, first, length = run.config.model, source.config.model, source.config.sequence_length
    if own.topology != first.topology:
        raise UserError(f"it has topology {own.topology!r}, and {source.run.path} {first.topology!r}")
    if own.text_length < length:
        raise UserError(f"it reads {own.text_length} tokens, and {source.run.path} is measured on {length}")
