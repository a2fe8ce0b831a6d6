"""Metrics by name: how each is computed from totals, and how its values compare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from minitransformer.evaluation.class_report import precisions_and_recalls
from minitransformer.evaluation.intervals import Bounds, bootstrap_interval, macro_f1, wilson_interval
from minitransformer.evaluation.items import Totals
from minitransformer.evaluation.translations import score_of
from minitransformer.registry import Registered

SMALLEST_DIFFERENCE = 0.002
"""smallest difference in nats (or bits per byte) that names a winner"""


class Metric(Registered, kind="metric"):
    """A metric, registered under its name in `metrics.jsonl`."""

    label: str
    """label for tables and axes, with its unit"""
    title: str
    """title for a heading or a sentence"""
    lower_is_better: bool | None = None
    """None if neither direction is better"""
    across_tokenizers: bool = False
    """whether it is comparable across tokenizers"""
    smallest_difference: float = 0.0
    """default smallest difference that names a winner"""
    in_words: str = ""
    """format for a line about a validation"""
    in_training: bool = True
    """whether training records it; if not, `evaluate` alone measures it"""

    @staticmethod
    def value(totals: Totals) -> float | None:
        """The value from the totals; None if it is undefined for them."""
        return None

    @staticmethod
    def interval(totals: Totals) -> Bounds | None:
        """The 95% confidence interval of the value; None if it is unknown."""
        return None


class ValidationLoss(Metric, name="validation_loss"):
    label, title, in_words = "validation loss (nats per target)", "validation loss", "loss {:.4f}"
    lower_is_better = True
    smallest_difference = SMALLEST_DIFFERENCE

    @staticmethod
    def value(totals: Totals) -> float | None:
        return totals.nats / totals.targets if totals.targets else None


class Perplexity(Metric, name="perplexity"):
    label, title, in_words = "validation perplexity", "perplexity", "perplexity {:.2f}"
    lower_is_better = True

    @staticmethod
    def value(totals: Totals) -> float | None:
        return math.exp(min(totals.nats / totals.targets, 700)) if totals.targets else None


class BitsPerByte(Metric, name="bits_per_byte"):
    """Σ nats / (ln 2 · bytes of the text), which is independent of the tokenizer."""

    label, title, in_words = "bits per byte of validation text", "bits per byte", "{:.4f} bits per byte"
    lower_is_better = True
    across_tokenizers = True
    smallest_difference = SMALLEST_DIFFERENCE

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.bytes is None else totals.nats / (math.log(2) * totals.bytes)


class Accuracy(Metric, name="accuracy"):
    label, title, in_words = "accuracy (fraction of targets)", "accuracy", "accuracy {:.1%}"
    lower_is_better = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.correct is None else totals.correct / totals.targets

    @staticmethod
    def interval(totals: Totals) -> Bounds | None:
        """Of texts, which are drawn independently, other than the tokens of a text."""
        return None if totals.confusion is None else wilson_interval(totals.correct or 0, totals.targets)


class MacroF1(Metric, name="macro_f1"):
    """The mean over classes of F1 = 2 · true positives / (predicted + actual), 0 for a class without either."""

    label, title, in_words = "macro F1 (mean over classes)", "macro F1", "macro F1 {:.1%}"
    lower_is_better = False
    across_tokenizers = True

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.confusion is None else float(macro_f1(totals.confusion))

    @staticmethod
    def interval(totals: Totals) -> Bounds | None:
        if totals.confusion is None or totals.targets < 2:
            return None
        return bootstrap_interval(macro_f1, totals.confusion)


class MacroPrecision(Metric, name="macro_precision"):
    """The mean over classes of precision = true positives / predicted, 0 for a class that is never predicted."""

    label, title, in_words = "macro precision (mean over classes)", "macro precision", "macro precision {:.1%}"
    lower_is_better = False
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.confusion is None else float(precisions_and_recalls(totals.confusion)[0].mean())


class MacroRecall(Metric, name="macro_recall"):
    """The mean over classes of recall = true positives / actual, 0 for a class without texts."""

    label, title, in_words = "macro recall (mean over classes)", "macro recall", "macro recall {:.1%}"
    lower_is_better = False
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.confusion is None else float(precisions_and_recalls(totals.confusion)[1].mean())


class MicroF1(Metric, name="micro_f1"):
    """F1 of the counts of all classes, which is the accuracy where each text has one class."""

    label, title, in_words = "micro F1 (all classes together)", "micro F1", "micro F1 {:.1%}"
    lower_is_better = False
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.confusion is None else float(totals.confusion.trace() / totals.confusion.sum())

    @staticmethod
    def interval(totals: Totals) -> Bounds | None:
        return Accuracy.interval(totals)


class CalibrationError(Metric, name="calibration_error"):
    """ECE = Σ_b n_b / n · |accuracy_b − mean confidence_b| over 15 bins of equal width.

    Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """

    label, title = "expected calibration error", "calibration error"
    in_words = "calibration error {:.1%}"
    lower_is_better = True
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.calibration is None else float(np.abs(totals.calibration).sum() / totals.targets)


class BLEU(Metric, name="bleu"):
    """BLEU of all translations together, by sacrebleu. Papineni et al. 2002; Post 2018 (arXiv 1804.08771)."""

    label = title = "BLEU"
    in_words = "BLEU {:.1f}"
    lower_is_better = False
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.bleu is None else score_of("bleu", totals.bleu)


class ChrF(Metric, name="chrf"):
    """The F2 of character n-grams of all translations together, by sacrebleu. Popović 2015."""

    label, title, in_words = "chrF2", "chrF2", "chrF2 {:.1f}"
    lower_is_better = False
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.chrf is None else score_of("chrf", totals.chrf)


class ExactMatch(Metric, name="exact"):
    """Fraction of texts predicted exactly, as by greedy decoding."""

    label, title, in_words = "exact match (fraction of texts)", "exact match", "exact match {:.1%}"
    lower_is_better = False
    across_tokenizers = True

    @staticmethod
    def value(totals: Totals) -> float | None:
        return totals.exact / totals.texts if totals.texts else None

    @staticmethod
    def interval(totals: Totals) -> Bounds | None:
        return wilson_interval(totals.exact, totals.texts) if totals.texts else None


class TokenF1(Metric, name="token_f1"):
    """The mean over generated answers of the F1 of their words."""

    label, title, in_words = "token F1 (mean over answers)", "token F1", "token F1 {:.1%}"
    lower_is_better = False
    across_tokenizers = True

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.token_f1 is None else totals.token_f1 / totals.texts


class AccuracyOfChoices(Metric, name="choice_accuracy"):
    """The share of multiple-choice items whose right candidate is chosen; among n that tie, it counts 1/n."""

    label, title, in_words = "accuracy (share of items)", "accuracy", "accuracy {:.1%}"
    lower_is_better = False
    across_tokenizers = True
    in_training = False

    @staticmethod
    def value(totals: Totals) -> float | None:
        return None if totals.chosen is None else totals.chosen / totals.choices

    @staticmethod
    def interval(totals: Totals) -> Bounds | None:
        """The score interval, which is no narrower for ties than for other items."""
        return None if totals.chosen is None else wilson_interval(totals.chosen, totals.choices)


class MajorityBaseline(Metric, name="majority_baseline"):
    """The accuracy of always predicting the most frequent training target."""

    label, title = "majority-class baseline (fraction of targets)", "majority-class baseline"
    in_words = "majority-class baseline {:.1%}"

    @staticmethod
    def value(totals: Totals) -> float | None:
        return totals.majority_baseline


class TrainingLoss(Metric, name="loss"):
    label, title = "training loss (nats per target)", "training loss"
    lower_is_better = True
    smallest_difference = SMALLEST_DIFFERENCE


class TokensPerSecond(Metric, name="tokens_per_second"):
    label = title = "tokens per second"
    lower_is_better = False


class OtherNumber(Metric):
    """A number in `metrics.jsonl` without a registered metric."""

    def __init__(self, name: str) -> None:
        self.label = self.title = name.replace("_", " ")


def metric_called(name: str) -> type[Metric] | Metric:
    """The metric for the number `name` in `metrics.jsonl`."""
    return Metric.registry.get(name) or OtherNumber(name)


def described_values(values: Mapping[str, float | None], intervals: Mapping[str, Bounds]) -> Iterator[str]:
    """The known values in words, with their intervals."""
    for name, value in values.items():
        if value is None:
            continue
        said = Metric.named(name).in_words.format(value)
        low, high = intervals.get(name, (0.0, 0.0))
        yield f"{said} (95% interval {low:.1%} to {high:.1%})" if name in intervals else said


def values_of(totals: Totals) -> dict[str, float | None]:
    """Every metric that training records; None for undefined ones."""
    told = {name: metric.value for name, metric in Metric.registry.items() if metric.in_words and metric.in_training}
    return {name: value(totals) for name, value in told.items()}


def intervals_of(totals: Totals) -> dict[str, Bounds]:
    """The 95% confidence interval of every metric that has one by its totals."""
    found = {name: metric.interval(totals) for name, metric in Metric.registry.items() if metric.in_words}
    return {name: interval for name, interval in found.items() if interval is not None}


def metric_text(name: str, value: float) -> str:
    """`value` of a metric as its words have it, without the words."""
    form = re.search(r"{[^}]*}", Metric.named(name).in_words)
    return (form[0] if form else "{:.4g}").format(value)
