"""How predicted classes compare with labels: by class, and how well probabilities are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.intervals import Bounds, Counts, f1_scores, wilson_interval
from minitransformer.evaluation.items import Items, Totals, resampled_weights

BINS = 15


@dataclass(frozen=True)
class OfClass:
    """Precision tp / (tp + fp), recall tp / (tp + fn) and their harmonic mean F1; 0 where a denominator is.

    The 95% intervals of the first two, which are shares of texts, are score intervals, and that of F1 is a bootstrap
    interval; there is none without texts, and none of the F1 of a single one.
    """

    name: str
    texts: int
    precision: float
    recall: float
    f1: float
    intervals: dict[str, Bounds | None]


@dataclass(frozen=True)
class ClassReport:
    """What is known of each class, and the texts by label and predicted class."""

    classes: list[OfClass]
    confusion: Counts

    def rows(self) -> list[list[str]]:
        """A table: a row for each class."""
        rows = [["class", "texts", "precision", "recall", "F1"]]
        for each in self.classes:
            values = (f"{getattr(each, name):.1%}{_ends(bounds)}" for name, bounds in each.intervals.items())
            rows.append([each.name, f"{each.texts:,}", *values])
        return rows

    def confusion_rows(self) -> list[list[str]]:
        """A table: for each class, how many of its texts were taken for each."""
        names = [each.name for each in self.classes]
        counts = zip(names, self.confusion.tolist(), strict=True)
        return [["label", *(f"as {name}" for name in names)], *([name, *map(_count, row)] for name, row in counts)]

    def to_json(self) -> dict[str, Any]:
        return {"classes": [asdict(each) for each in self.classes], "confusion": self.confusion.tolist()}


def _count(number: int) -> str:
    return f"{number:,}"


def _ends(bounds: Bounds | None) -> str:
    return "" if bounds is None else " [{:.1%}, {:.1%}]".format(*bounds)


def precisions_and_recalls(confusion: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """[..., classes] precision and recall of each class of `confusion` [..., classes, predicted classes]; 0/0 is 0."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return right / np.maximum(confusion.sum(-2), 1), right / np.maximum(confusion.sum(-1), 1)


def class_items(labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> Items:
    """What is counted of texts with these `labels` [texts], of whose classes a model gave `probabilities`.

    The confidence is the highest probability [texts, classes], and a text is correct if its label has it.
    """
    predicted, confidence, classes = probabilities.argmax(1), probabilities.max(1), probabilities.shape[1]
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    calibration = np.zeros((len(labels), BINS))
    right = predicted == labels
    calibration[np.arange(len(labels)), bins] = right - confidence
    columns = {"targets": np.ones(len(labels), np.int64), "correct": right.astype(np.int64), "calibration": calibration}
    return Items(columns, labels * classes + predicted, classes)


def class_report(names: Sequence[str], items: Items) -> ClassReport:
    """The report on texts of the classes `names`."""
    confusion = items.totals().confusion
    assert confusion is not None, "of texts with classes"
    drawn = np.stack([_f1_scores(items.totals(weights)) for weights in resampled_weights(len(items))])
    right, texts, taken = np.diagonal(confusion).tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    figures = np.stack([*precisions_and_recalls(confusion), f1_scores(confusion)]).T.tolist()
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0).tolist()
    classes = []
    for number, (name, (precision, recall, f1)) in enumerate(zip(names, figures, strict=True)):
        has_f1 = len(items) > 1 and texts[number] + taken[number] > 0
        bounds = {
            "precision": _share_interval(right[number], taken[number]),
            "recall": _share_interval(right[number], texts[number]),
            "f1": (low[number], high[number]) if has_f1 else None,
        }
        classes.append(OfClass(name, texts[number], precision, recall, f1, bounds))
    return ClassReport(classes, confusion)


def _f1_scores(totals: Totals) -> npt.NDArray[np.float64]:
    assert totals.confusion is not None, "of texts with classes"
    return f1_scores(totals.confusion)


def _share_interval(right: int, count: int) -> Bounds | None:
    return wilson_interval(right, count) if count else None


@dataclass(frozen=True)
class Bin:
    """The texts whose confidence is from `low` to `high`: how many, their mean confidence, and their accuracy."""

    low: float
    high: float
    texts: int
    confidence: float
    accuracy: float


def reliability(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> list[Bin]:
    """The bins that have texts. Niculescu-Mizil and Caruana 2005, "Predicting good probabilities", section 4."""
    places = np.minimum((confidences * BINS).astype(int), BINS - 1)
    found = []
    for place in np.unique(places).tolist():
        inside = places == place
        means = float(confidences[inside].mean()), float(right[inside].mean())
        found.append(Bin(place / BINS, (place + 1) / BINS, int(inside.sum()), *means))
    return found
