"""How predicted classes compare with labels: by class, and how well probabilities are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15


@dataclass(frozen=True)
class OfClass:
    """Precision tp / (tp + fp), recall tp / (tp + fn) and their harmonic mean F1; 0 where a denominator is."""

    name: str
    precision: float
    recall: float
    f1: float
    texts: int


@dataclass(frozen=True)
class ClassReport:
    """What is known of each class, the texts by label and predicted class, and the calibration error."""

    classes: list[OfClass]
    confusion: npt.NDArray[np.int64]
    calibration_error: float

    def rows(self) -> list[list[str]]:
        """A table: a row for each class, with the texts that were taken for each."""
        names = [each.name for each in self.classes]
        head = ["class", "precision", "recall", "F1", "texts", *(f"as {name}" for name in names)]
        return [head] + [
            [each.name, *(f"{value:.1%}" for value in (each.precision, each.recall, each.f1)), f"{each.texts:,}"]
            + [f"{count:,}" for count in counts]
            for each, counts in zip(self.classes, self.confusion, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "classes": [asdict(each) for each in self.classes],
            "confusion": self.confusion.tolist(),
            "calibration_error": self.calibration_error,
        }


def class_report(names: Sequence[str], labels: Sequence[int], probabilities: Sequence[Sequence[float]]) -> ClassReport:
    """The report on texts with these `labels`, of which a model gave the `probabilities` of the classes `names`."""
    p, expected = np.array(probabilities, np.float64).reshape(len(labels), len(names)), np.array(labels, np.int64)
    predicted = p.argmax(1)
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (expected, predicted), 1)
    right, taken, there = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    precision, recall = right / np.maximum(taken, 1), right / np.maximum(there, 1)
    f1 = 2 * right / np.maximum(taken + there, 1)
    of_class = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), there.tolist(), strict=True)
    return ClassReport(
        [OfClass(*each) for each in of_class], confusion, calibration_error(p.max(1), predicted == expected)
    )


def calibration_error(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    """ECE = Σ_b n_b / n · |accuracy_b − mean confidence_b| over 15 bins of equal width.

    Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    sums = np.bincount(bins, right - confidences, BINS)
    return float(np.abs(sums).sum() / len(confidences))
