"""The same items under two runs, and the texts of a run's data with words exchanged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.errors import UserError
from minitransformer.evaluation.counterfactuals import (
    Change,
    Exchange,
    Variant,
    change_of_class,
    change_of_text,
    variants_of,
)
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.runs.predicting import EvaluatedPart, Predictions
from minitransformer.text.chat_template import USER
from minitransformer.text.conversations import ConversationRow
from minitransformer.text.datasets import Pairs
from minitransformer.text.datasets.labels import Labels


def check_comparable(first: HeldOutData, second: HeldOutData) -> None:
    """Raises `UserError` for two runs that cannot be compared on the same items."""
    ours, theirs = first.run, second.run
    if first.kind != second.kind:
        raise UserError(f"{ours.path} reads {first.kind}, and {theirs.path} {second.kind}: compare runs of one kind")
    if first.split == "validation" and _validation_of(first) != _validation_of(second):
        raise UserError(f"{theirs.path} has other validation data than {ours.path}: name data for both with --data")
    if ours.class_names != theirs.class_names and first.kind == "texts":
        raise UserError(f"{theirs.path} has other classes than {ours.path}: compare runs with the same ones")
    if first.kind == "windows" and _windows(first) != _windows(second):
        raise UserError(
            f"{theirs.path} reads other windows than {ours.path}, as its tokenizer, context or masks are others: "
            "compare their bits per byte, each from an evaluation of its own"
        )


def _validation_of(held_out: HeldOutData) -> tuple[Any, ...]:
    data = held_out.config.data
    return data.data, data.validation_data, data.validation_fraction


def _windows(data: HeldOutData) -> tuple[Any, ...]:
    loader = data.loader
    drawn = () if loader.objective.predicts_text else (loader.seed, loader.shape.rows, loader.objective.settings)
    tokens = data.prepared.num_tokens(data.split)
    return data.run.tokenizer.fingerprint, type(loader.objective), loader.shape.window, data.stride, tokens, drawn


def paired_parts(
    first: tuple[HeldOutData, Predictions], second: tuple[HeldOutData, Predictions]
) -> list[tuple[EvaluatedPart, EvaluatedPart]]:
    """Each part of two runs, with the items that both have read, in the same order."""
    our_rows, their_rows = (data.rows()[1] if data.has_rows else None for data, _ in (first, second))
    others = {part.name: part for part in second[1].parts}
    return [_common(part, our_rows, others[part.name], their_rows) for part in first[1].parts if part.name in others]


def _common(
    ours: EvaluatedPart, our_rows: list[int] | None, theirs: EvaluatedPart, their_rows: list[int] | None
) -> tuple[EvaluatedPart, EvaluatedPart]:
    keys = [_keys(ours, our_rows), _keys(theirs, their_rows)]
    both = [key for key in keys[0] if key in keys[1]]
    if not both:
        raise UserError("the two runs have read no item in common: give items that fit into the context of both")
    return _part_at(ours, [keys[0][key] for key in both]), _part_at(theirs, [keys[1][key] for key in both])


def _part_at(part: EvaluatedPart, places: list[int]) -> EvaluatedPart:
    return replace(part, items=part.items[np.array(places)], numbers=part.numbers[np.array(places)])


def _keys(part: EvaluatedPart, rows: list[int] | None) -> dict[tuple[int, int], int]:
    """The place of each item by its row in the data, and its place among several of that row."""
    found: dict[tuple[int, int], int] = {}
    seen: Counter[int] = Counter()
    for place, number in enumerate(part.numbers.tolist()):
        row = number if rows is None else rows[number]
        found[row, seen[row]] = place
        seen[row] += 1
    return found


def exchanged_data(data: HeldOutData, exchanges: Sequence[Exchange], folder: Path) -> tuple[HeldOutData, list[Variant]]:
    """Every text of `data` with every exchange that changes it, written to `folder`, and what each is a variant of.

    Raises `UserError` for data without rows, and for texts that have none of the words.
    """
    corpus, numbers = data.rows()
    rows = list(corpus.pairs())
    own = [rows[number] for number in numbers]
    path = folder / "exchanged.jsonl"
    variants = []
    with path.open("w", encoding="utf-8") as file:
        for variant, text in variants_of([_exchangeable(row) for row in own], exchanges):
            variants.append(variant)
            file.write(json.dumps(_row(data, own[variant.item], text, variant.exchange)) + "\n")
    if not variants:
        raise UserError("no text of this data has a word of the exchanges: give others with --exchanges")
    changed = HeldOutData.of_files(data.run, [str(path)], None)
    return changed, [variants[row] for row in changed.rows()[1]]


def _exchangeable(row: Any) -> str:
    """The text of a row that is exchanged: a labelled text, a source, or what a user says."""
    if isinstance(row, ConversationRow):
        return "\n".join(message.content for message in row.messages if message.role == USER)
    return str(row[0])


def _row(data: HeldOutData, row: Any, text: str, exchange: Exchange) -> dict[str, Any]:
    """A row as the dataset of `data` reads it, with an exchange in it."""
    config = data.config.data
    settings: Any = config.dataset.settings
    if config.dataset.variant is Labels:
        return {config.field: text, settings.label_field: row.label}
    if config.dataset.variant is Pairs:
        return {settings.source_field: text, settings.target_field: row[1]}
    said = [exchange.applied(each.content) if each.role == USER else each.content for each in row.messages]
    return {"messages": [{"role": each.role, "content": text} for each, text in zip(row.messages, said, strict=True)]}


def changes_of(before: Predictions, after: Predictions, variants: Sequence[Variant]) -> list[tuple[Variant, Change]]:
    """What became of each prediction by an exchange."""
    was, now = before.evaluation.probabilities, after.evaluation.probabilities
    if was is not None and now is not None:
        return [(each, change_of_class(was[each.item], row)) for each, row in zip(variants, now, strict=True)]
    old, new = before.parts[-1], after.parts[-1]
    if not old.predictions or not new.predictions:
        raise UserError("no answer is generated to these texts, so that none can change: leave --counterfactuals out")
    texts = {key: old.told[old.predictions][place] for key, place in _keys(old, None).items()}
    found = []
    for (number, count), place in _keys(new, None).items():
        variant = variants[number]
        if (base := texts.get((variant.item, count))) is not None:
            found.append((variant, change_of_text(base, new.told[new.predictions][place], variant.exchange)))
    return found
