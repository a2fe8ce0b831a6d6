"""What `evaluate` does with data of the kind that a run has learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from minitransformer.analysis.evaluation import (
    Found,
    Section,
    against_section,
    class_section,
    counterfactual_section,
    grouped,
    metric_section,
    of_groups,
)
from minitransformer.analysis.evaluation_page import class_pictures, position_picture
from minitransformer.commands.evaluate_options import Options
from minitransformer.evaluation.counterfactuals import SHIPPED, read_exchanges
from minitransformer.evaluation.estimates import Estimate, estimates_of
from minitransformer.runs import Run
from minitransformer.runs.by_value import texts_by_value, windows_by_value
from minitransformer.runs.comparing import changes_of, check_comparable, exchanged_data, paired_parts
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.predicting import EvaluatedPart, Predictions, Wanted, predict_all
from minitransformer.text.datasets import PlainText
from minitransformer.training.machine import choose_device

SHOWN = 5
"""values without enough text that are named"""


def evaluate_data(run: Run, options: Options) -> Found:
    """The metrics of a model on data like that of its run, and what else was asked for."""
    data = _held_out(run, options)
    # What may be refused comes before what takes long.
    other = None if options.against is None else _held_out(Run.open(options.against), options)
    if other is not None:
        check_comparable(data, other)
    with TemporaryDirectory() as folder:
        groups = _groups(data, options, Path(folder))
        exchanges = read_exchanges(options.exchanges or SHIPPED) if options.counterfactuals else []
        changed, variants = exchanged_data(data, exchanges, Path(folder)) if exchanges else (None, [])
        found = _predicted(data, options, options.checkpoint)
        sections = [*_metric_sections(data, found), *groups(found)]
        if other is not None:
            sections += _against(data, found, other, options)
        if changed is not None:
            after = _predicted(changed, options, options.checkpoint)
            classes = run.class_names if found.classes is not None else ()
            sections.append(counterfactual_section(changes_of(found, after, variants), classes))
    record = {section.name: section.record for section in sections}
    outputs = {"outputs": found.outputs} if found.outputs else {}
    return Found(sections, {"stride": options.stride, **record, **outputs}, found.parts)


def _groups(data: HeldOutData, options: Options, folder: Path) -> Callable[[Predictions], list[Section]]:
    """What makes the sections of groups; raises `UserError` for a column that the data does not have."""
    if (column := options.group_by) is None:
        return lambda found: []
    if data.config.data.dataset.variant is PlainText and data.split == "train":
        paths = texts_by_value(options.data, data.config.data.field, column, folder)
        return lambda found: [_windows_by_group(data.run, options, column, paths, found.parts[0])]
    labels = data.column(column)
    return lambda found: [grouped(part, column, labels).section() for part in found.parts]


def _windows_by_group(
    run: Run, options: Options, column: str, paths: Mapping[str, Path], part: EvaluatedPart
) -> Section:
    """The windows of the documents of each value."""
    groups, short = {}, []
    for value, data in windows_by_value(run, paths, options.stride):
        if data is None:
            short.append(value)
        else:
            groups[value] = _predicted(data, options, options.checkpoint).evaluation.items
    section = of_groups(part, column, groups).section()
    if short:
        named = ", ".join(short[:SHOWN]) + (f" and {len(short) - SHOWN} more" if len(short) > SHOWN else "")
        section.notes.append(f"Without enough text for a window: {named}.")
    return section


def _held_out(run: Run, options: Options) -> HeldOutData:
    if options.data:
        return HeldOutData.of_files(run, options.data, options.target_data, options.stride)
    return HeldOutData.of_run(run, options.stride)


def _predicted(data: HeldOutData, options: Options, checkpoint: str | None) -> Predictions:
    device = choose_device(options.device)
    model = data.run.load_model(checkpoint, str(device))
    return predict_all(model, data, device, Wanted(options.batch_size, options.num_beams))


def _metric_sections(data: HeldOutData, found: Predictions) -> Iterator[Section]:
    """The metrics of each part, and of each class."""
    for number, part in enumerate(found.parts):
        estimates = estimates_of(part.items)
        baseline = None if number else data.loader.majority_baseline
        if baseline is not None:
            estimates["majority_baseline"] = Estimate(baseline, None)
        section = metric_section(part, estimates, found.notes if not number else ())
        if not number and found.classes is None and data.kind != "conversations":  # whose rows hold several
            section.pictures.append(position_picture(found.evaluation.by_position))
        yield section
    if found.classes is not None:
        section = class_section(found.classes)
        section.pictures += class_pictures(found.classes, found.evaluation)
        yield section


def _against(data: HeldOutData, found: Predictions, other: HeldOutData, options: Options) -> Iterator[Section]:
    """The differences from another run on the items that both have read."""
    theirs = _predicted(other, options, None)
    sizes = {part.name: len(part.items) for part in found.parts}
    for ours, its in paired_parts((data, found), (other, theirs)):
        yield against_section(ours, its, str(options.against), sizes[ours.name] - len(ours.items))
