"""What `evaluate --choices` reads, measures and tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minitransformer.amounts import counted
from minitransformer.analysis.evaluation import (
    CLEAR,
    Found,
    Grouped,
    Section,
    counterfactual_section,
    difference_table,
    ends_text,
    estimate_text,
    grouped,
)
from minitransformer.commands.evaluate_options import Options
from minitransformer.errors import UserError
from minitransformer.evaluation.choices import (
    Normalisation,
    ScoredItem,
    accuracies,
    by_group,
    candidate_probabilities,
    chance,
    choice_items,
    defined_normalisations,
    likeliest,
)
from minitransformer.evaluation.counterfactuals import SHIPPED, change_of_class, read_exchanges, variants_of
from minitransformer.evaluation.estimates import paired_differences
from minitransformer.reporting.tables import Table
from minitransformer.runs import Run
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.runs.predicting import EvaluatedPart
from minitransformer.text.choices import (
    TEMPLATE,
    ChoiceItem,
    FewShot,
    holds_minimal_pairs,
    read_choices,
    read_minimal_pairs,
)
from minitransformer.text.templates import read_template
from minitransformer.training.machine import choose_device

METRIC = "choice_accuracy"


def evaluate_choices(run: Run, options: Options) -> Found:
    """How often a model chooses the right candidate, and what else was asked for."""
    items = read_items(options)
    exchanges = read_exchanges(options.exchanges or SHIPPED) if options.counterfactuals else []
    other = None if options.against is None else Run.open(options.against)
    scored = score_all(run, options.checkpoint, items, options)
    parts, summary = choice_parts(items, scored), choice_summary(scored)
    sections = [_section(summary, options)]
    if options.group_by is not None or summary["groups"]:
        column, labels = options.group_by or "group", [item.group for item in items]
        sections.append(_group_section([grouped(part, column, labels) for part in parts]))
    if other is not None:
        theirs = choice_parts(items, score_all(other, None, items, options))
        sections.append(_against_section(parts, theirs, str(options.against)))
    if exchanges:
        sections.append(_counterfactual(run, options, items, scored, exchanges))
    record = {section.name: section.record for section in sections}
    return Found(sections, {"shots": options.shots, "seed": options.seed, **record}, parts)


def read_items(options: Options) -> list[ChoiceItem]:
    """The items of all files: minimal pairs, or rows after examples, from a file of these or the other rows.

    Raises `UserError` for files of both kinds, and for settings of prompts that minimal pairs do not have.
    """
    paths = [Path(path) for path in options.data]
    are_pairs = [holds_minimal_pairs(path) for path in paths]
    if all(are_pairs):
        if options.shots or options.template or options.examples:
            raise UserError(f"{paths[0]} has minimal pairs, which no prompt precedes: leave out --shots and --template")
        return [item for path in paths for item in read_minimal_pairs(path, options.group_by)]
    if any(are_pairs):
        raise UserError(
            f"{paths[are_pairs.index(True)]} has minimal pairs, and {paths[are_pairs.index(False)]} has choices: "
            "evaluate them one after the other"
        )
    rows = [row for path in paths for row in read_choices(path)]
    pool = read_choices(options.examples) if options.examples else rows
    source = read_template(options.template) if options.template else TEMPLATE
    origin = str(options.template) if options.template else "of questions"
    prompts = FewShot(pool, options.shots, options.seed, source, origin)
    return [prompts.item(row, options.group_by) for row in rows]


def score_all(run: Run, checkpoint: str | None, items: Sequence[ChoiceItem], options: Options) -> list[ScoredItem]:
    """Every item scored, with a progress bar on a terminal."""
    scorer = ChoiceScorer.of_run(run, checkpoint, str(choose_device(options.device)))
    return list(tqdm(scorer.scored(items), total=len(items), desc="items", unit="", leave=False, disable=None))


def choice_summary(scored: Sequence[ScoredItem]) -> dict[str, Any]:
    """The accuracy by every normalisation, of all items and of each group, as JSON."""
    groups = by_group(scored)
    return {
        "items": len(scored),
        "chance": chance(scored),
        "accuracy": {name: each.to_json() for name, each in accuracies(scored).items()},
        "groups": {
            group: {name: each.to_json() for name, each in accuracies(some).items()}
            for group, some in (groups.items() if len(groups) > 1 else ())
        },
    }


def choice_parts(items: Sequence[ChoiceItem], scored: Sequence[ScoredItem]) -> list[EvaluatedPart]:
    """A part for each normalisation; each tells all of an item: its prompt, its candidates with scores, and choices."""
    names = defined_normalisations(scored)
    chosen = [{name: likeliest(each, of) for name, of in names.items()} for each in scored]
    candidates = [
        [{"text": text, **score._asdict()} for text, score in zip(item.candidates, each.candidates, strict=True)]
        for item, each in zip(items, scored, strict=True)
    ]
    answers = [item.answer for item in items]
    told: dict[str, Sequence[Any]] = {"candidates": candidates, "answer": answers, "chosen": chosen}

    def texts(place: int) -> dict[str, str]:
        return {name: getattr(items[place], name) for name in ("where", "group", "context")}

    numbers = np.arange(len(items))
    return [
        EvaluatedPart(f"choices_{name}", of.label, choice_items(scored, of), numbers, texts, told, "chosen")
        for name, of in names.items()
    ]


def _section(summary: dict[str, Any], options: Options) -> Section:
    rows = [
        [Normalisation.named(name).label, f"{each['accuracy']:.1%}", ends_text(METRIC, each["interval"]), each["ties"]]
        for name, each in summary["accuracy"].items()
    ]
    before = f", after {options.shots} examples each" if options.shots else ""
    title = f"{summary['items']:,} items{before}; chance is {summary['chance']:.1%}"
    return Section("choices", [Table(title, ("log-likelihood", "accuracy", "95% interval", "ties"), rows)], [], summary)


def _group_section(found: Sequence[Grouped]) -> Section:
    """The groups by each normalisation, side by side."""
    first = found[0]
    rows = [
        [first.named(group), f"{size:,}", *(estimate_text(METRIC, each.groups[group][METRIC]) for each in found)]
        for group, size in first.sizes.items()
    ]
    gaps = [
        [each.part.title, estimate_text(METRIC, gap.gap), f"{gap.lowest} to {gap.highest}"]
        for each in found
        for gap in each.gaps.values()
    ]
    tables = [
        Table(f"Accuracy by {first.column}", (first.column, "items", *(each.part.title for each in found)), rows),
        first.gap_table(gaps),
    ]
    record = {"column": first.column, **{each.part.name: each.to_json() for each in found}}
    return Section("choices_by_group", tables, first.notes, record)


def _against_section(ours: Sequence[EvaluatedPart], theirs: Sequence[EvaluatedPart], name: str) -> Section:
    """Two runs side by side, by each normalisation."""
    rows = [
        (part.title, METRIC, paired_differences(part.items, other.items)[METRIC])
        for part, other in zip(ours, theirs, strict=True)
    ]
    title = f"Beside {name}, on the same {counted(len(ours[0].items), 'items')}"
    record = {part.name: each.to_json() for part, (_, _, each) in zip(ours, rows, strict=True)}
    return Section("choices_against", [difference_table(title, "log-likelihood", rows)], [CLEAR], record)


def _counterfactual(
    run: Run, options: Options, items: Sequence[ChoiceItem], scored: Sequence[ScoredItem], exchanges: Sequence[Any]
) -> Section:
    """How choices change by words that are exchanged in a prompt and its candidates."""
    texts = ["\n".join([item.context, *item.candidates]) for item in items]
    variants = [variant for variant, _ in variants_of(texts, exchanges)]
    if not variants:
        raise UserError("no item has a word of the exchanges: give others with --exchanges")
    changed = []
    for place, exchange in variants:
        candidates = tuple(map(exchange.applied, items[place].candidates))
        changed.append(replace(items[place], context=exchange.applied(items[place].context), candidates=candidates))
    after = score_all(run, options.checkpoint, changed, options)
    changes = [
        (variant, change_of_class(*map(candidate_probabilities, (scored[variant.item], new)), named=False))
        for variant, new in zip(variants, after, strict=True)
    ]
    return counterfactual_section(changes, ())
