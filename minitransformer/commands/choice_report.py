"""What `evaluate --choices` reads, prints and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitransformer import files
from minitransformer.commands import table_width
from minitransformer.errors import UserError
from minitransformer.evaluation.choices import Normalisation, ScoredItem, accuracies, by_group, chance, likeliest
from minitransformer.reporting.plain import plain_table
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.text.choices import (
    TEMPLATE,
    ChoiceItem,
    FewShot,
    holds_minimal_pairs,
    read_choices,
    read_minimal_pairs,
)
from minitransformer.text.templates import read_template


def read_items(
    paths: Sequence[Path], *, shots: int, seed: int, template: Path | None, examples: Path | None
) -> list[ChoiceItem]:
    """The items of all files: minimal pairs, or rows after `shots` examples, from `examples` or the other rows.

    Raises `UserError` for files of both kinds, and for settings of prompts that minimal pairs do not have.
    """
    are_pairs = [holds_minimal_pairs(path) for path in paths]
    if all(are_pairs):
        if shots or template or examples:
            raise UserError(f"{paths[0]} has minimal pairs, which no prompt precedes: leave out --shots and --template")
        return [item for path in paths for item in read_minimal_pairs(path)]
    if any(are_pairs):
        raise UserError(
            f"{paths[are_pairs.index(True)]} has minimal pairs, and {paths[are_pairs.index(False)]} has choices: "
            "evaluate them one after the other"
        )
    rows = [row for path in paths for row in read_choices(path)]
    pool = read_choices(examples) if examples else rows
    source = read_template(template) if template else TEMPLATE
    prompts = FewShot(pool, shots, seed, source, str(template) if template else "of questions")
    return [prompts.item(row) for row in rows]


def score_all(scorer: ChoiceScorer, items: Sequence[ChoiceItem]) -> list[ScoredItem]:
    """Every item scored, with a progress bar on a terminal."""
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


def choice_tables(found: dict[str, Any]) -> Iterator[str]:
    """A `choice_summary` as tables for the terminal: one of normalisations, and one of groups if there are several."""
    rows = [
        [Normalisation.named(name).label, f"{each['accuracy']:.1%}", _interval(each), each["ties"]]
        for name, each in found["accuracy"].items()
    ]
    yield plain_table(["log-likelihood", "accuracy", "95% interval", "ties"], rows, table_width())
    if found["groups"]:
        labels = [Normalisation.named(name).label for name in found["accuracy"]]
        lines = [
            [group, next(iter(of.values()))["items"], *(f"{each['accuracy']:.1%}" for each in of.values())]
            for group, of in found["groups"].items()
        ]
        yield plain_table(["group", "items", *labels], lines, table_width())


def _interval(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{low:.1%} to {high:.1%}"


def write_items(out: Path, items: Sequence[ChoiceItem], scored: Sequence[ScoredItem]) -> None:
    """A line for each item: its prompt, its candidates with their scores, and which are chosen."""
    lines = []
    for item, each in zip(items, scored, strict=True):
        candidates = [
            {"text": text, **score._asdict()} for text, score in zip(item.candidates, each.candidates, strict=True)
        ]
        chosen = {name: likeliest(each, Normalisation.named(name)) for name in accuracies([each])}
        row = {"where": item.where, "group": item.group, "context": item.context, "candidates": candidates}
        lines.append(json.dumps({**row, "answer": item.answer, "chosen": chosen}, ensure_ascii=False) + "\n")
    with files.writing(out, "choose another --out"):
        files.write_text(out, "".join(lines))
