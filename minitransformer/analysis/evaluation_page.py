"""An evaluation as a page: its sections, with figures, and the items on which a model does worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from minitransformer.analysis.evaluation import Found, Section
from minitransformer.evaluation.class_report import ClassReport, reliability
from minitransformer.evaluation.estimates import SMALL, Samples
from minitransformer.reporting import figures
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.pages import Page
from minitransformer.reporting.report import add_facts, add_table
from minitransformer.reporting.tables import Picture, Table
from minitransformer.runs.evaluating import Evaluation
from minitransformer.runs.predicting import EvaluatedPart

WORST = 20
"""items that are shown"""
MOST_CLASSES = 20
"""of a confusion matrix with room for its numbers"""
GROWTH = 1.25
"""of ranges of positions with a common mean, from one to the next"""
LONGEST = 300
"""characters of a text that are shown"""


def evaluation_page(about: Mapping[str, str], found: Found) -> str:
    """The HTML of an evaluation; raises `UserError` without matplotlib."""
    page = Page(f"Evaluation of {about['run']}")
    add_facts(page, about)
    for section in found.sections:
        add_section(page, section)
    if (worst := worst_table(found.parts[-1])).rows:
        add_table(page, worst)
    return page.html()


def add_section(page: Page, section: Section) -> None:
    """Add the tables, notes and pictures of `section`; raises `UserError` without matplotlib."""
    for table in section.tables:
        if table.rows:
            add_table(page, table)
    for note in section.notes:
        page.paragraph(note)
    for picture in section.pictures:
        page.figure(figures.png(picture.draw()), f"{picture.title}. {picture.caption}", picture.title)


def class_pictures(report: ClassReport, evaluation: Evaluation) -> list[Picture]:
    """The confusion matrix, unless it is too large, and how confidence compares with accuracy."""
    labels, probabilities = evaluation.labels, evaluation.probabilities
    assert labels is not None, "of labelled texts"
    assert probabilities is not None, "of labelled texts"
    names = [each.name for each in report.classes]
    pictures: list[Picture] = []
    if len(names) <= MOST_CLASSES:
        shares = report.confusion / np.maximum(report.confusion.sum(1, keepdims=True), 1)
        pictures.append(_confusion(names, shares))
    return [*pictures, _reliability(probabilities, probabilities.argmax(1) == labels)]


def _confusion(names: Sequence[str], shares: Samples) -> Picture:
    title = "Confusion matrix"

    def draw() -> Any:
        columns = [f"as {name}" for name in names]
        return figures.heatmap(
            shares,
            rows=names,
            columns=columns,
            title=title,
            value_label="share of the label's texts",
            format_spec=".0%",
        )

    return Picture(title, draw, "A row for each label: which share of its texts is taken for each class.")


def _reliability(probabilities: Samples, right: Any) -> Picture:
    title = "Reliability"
    bins = reliability(probabilities.max(1), right)

    def draw() -> Any:
        confidence, accuracy = [each.confidence for each in bins], [each.accuracy for each in bins]
        ends = [min(confidence), 1.0]
        curves = [Curve("model", confidence, accuracy), Curve("calibrated", ends, ends)]
        return figures.curves(
            curves, x_label="confidence (probability of the predicted class)", y_label="accuracy", title=title
        )

    counts = ", ".join(f"{each.texts:,}" for each in bins)
    return Picture(
        title, draw, f"Texts by confidence, in bins of equal width; number of texts from left to right: {counts}."
    )


def position_picture(by_position: Samples) -> Picture:
    """The mean loss of the targets at each position, and of several positions together where there are many."""
    title = "Loss by position"
    nats, counts = by_position
    ends = np.unique(np.floor(GROWTH ** np.arange(1 + np.log(len(counts) + 1) / np.log(GROWTH))).astype(int))
    spans = [(low, high) for low, high in pairwise([*ends[ends <= len(counts)], len(counts) + 1]) if low < high]
    sums = [(nats[low - 1 : high - 1].sum(), counts[low - 1 : high - 1].sum()) for low, high in spans]
    least = min(SMALL, max(count for _, count in sums))
    places = [(low + high - 1) / 2 for (low, high), (_, count) in zip(spans, sums, strict=True) if count >= least]
    curve = Curve("model", places, [float(total / count) for total, count in sums if count >= least])

    def draw() -> Any:
        return figures.curves([curve], x_label="position", y_label="loss (nats per target)", title=title, log_x=True)

    return Picture(title, draw, f"The mean over ranges of positions that have {least:.0f} or more targets.")


def worst_table(part: EvaluatedPart) -> Table:
    """The items with the highest loss per target; of answers the lowest F1; of choices the surest mistakes."""
    columns = part.items.columns
    if "token_f1" in columns:
        what, shown, is_wrong = "token F1", columns["token_f1"], columns["token_f1"] < 1
    elif "nats" in columns:
        what, shown = "loss", columns["nats"] / np.maximum(columns["targets"], 1)
        is_wrong = shown > 0
    else:
        what, shown = "nats less", np.array([_nats_less(part, place) for place in range(len(part.items))])
        is_wrong = shown > 0
    order = np.argsort(shown if what == "token F1" else -shown, kind="stable")
    places = order[is_wrong[order]][:WORST].tolist()
    rows = [{what: float(shown[place]), **_shown(part.describe(place))} for place in places]
    names = list(rows[0]) if rows else []
    return Table(f"The {len(rows)} worst items", names, [list(row.values()) for row in rows])


def _nats_less(part: EvaluatedPart, place: int) -> float:
    """How many nats less the right candidate has than the likeliest."""
    candidates, answer = part.told["candidates"][place], part.told["answer"][place]
    return max(each["nats"] for each in candidates) - candidates[answer]["nats"]


def _shown(item: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of an item."""
    if "candidates" in item:
        texts = [each["text"] for each in item["candidates"]]
        likeliest = max(item["candidates"], key=lambda each: each["nats"])["text"]
        return {"context": _end(item["context"]), "right": texts[item["answer"]], "chosen": likeliest}
    told = {name: item[name] for name in ("label", "predicted") if name in item}
    if "probabilities" in item:
        told["confidence"] = f"{max(item['probabilities'].values()):.1%}"
    names = ("text", "prompt", "source", "reference", "answer", "translation")
    return {**told, **{name: _end(item[name]) for name in names if name in item}}


def _end(text: str) -> str:
    """The end of a long text, where a prompt asks."""
    return text if len(text) <= LONGEST else f"…{text[-LONGEST:]}"
