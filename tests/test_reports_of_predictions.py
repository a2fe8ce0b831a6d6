"""What `evaluate` says of classes and of translations: figures of their definitions, and those of sacrebleu."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.evaluation.class_report import class_items, class_report, reliability
from minitransformer.evaluation.estimates import defined_metrics, estimates_of
from minitransformer.evaluation.intervals import wilson_interval
from minitransformer.evaluation.items import Items
from minitransformer.evaluation.translations import signature_of, translation_columns

SACREBLEU = importlib.util.find_spec("sacrebleu") is not None


def classified(labels: list[int], predicted: list[int]) -> Items:
    return class_items(np.array(labels), np.eye(3)[predicted])


def test_precision_recall_and_f1_are_those_of_their_definitions() -> None:
    items = classified([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0])
    report = class_report(["a", "b", "c"], items)
    assert report.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    a, b, c = report.classes
    assert (a.precision, a.recall, a.texts) == (2 / 4, 2 / 3, 3)
    assert a.f1 == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert (b.precision, b.recall, b.f1) == (1 / 2, 1 / 2, 1 / 2)
    assert (c.precision, c.recall, c.f1) == (0, 0, 0)
    for each in (a, b):
        assert None not in each.intervals.values()
        assert all(bounds[0] < getattr(each, name) < bounds[1] for name, bounds in each.intervals.items() if bounds)
    assert c.intervals["precision"] is None  # as it is never predicted
    assert c.intervals["recall"] == wilson_interval(0, 1)
    values = defined_metrics(items.totals())
    assert values["calibration_error"] == pytest.approx(3 / 6)
    assert values["micro_f1"] == values["accuracy"] == 3 / 6
    assert report.confusion_rows()[1] == ["a", "2", "1", "0"]
    assert report.rows()[1][:2] == ["a", "3"]
    assert report.rows()[1][2].startswith("50.0% [")


def test_few_texts_without_a_mistake_have_no_certain_figures() -> None:
    of_one, absent, _ = class_report(["a", "b", "c"], classified([0], [0])).classes
    assert of_one.intervals == {"precision": wilson_interval(1, 1), "recall": wilson_interval(1, 1), "f1": None}
    assert absent.intervals == {"precision": None, "recall": None, "f1": None}
    assert estimates_of(classified([0], [0]))["macro_f1"].interval is None
    assert estimates_of(classified([0, 1], [0, 1]))["macro_f1"].interval is not None


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_they_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, predicted = [label for label, _ in pairs], [each for _, each in pairs]
    items = classified(labels, predicted)
    report, values = class_report(["a", "b", "c"], items), defined_metrics(items.totals())
    assert (report.confusion == confusion_matrix(labels, predicted, labels=[0, 1, 2])).all()
    theirs: Any = precision_recall_fscore_support(labels, predicted, labels=[0, 1, 2], zero_division=0)
    ours = [[getattr(each, name) for each in report.classes] for name in ("precision", "recall", "f1", "texts")]
    np.testing.assert_allclose(ours, theirs)
    for average, names in (("macro", ["macro_precision", "macro_recall", "macro_f1"]), ("micro", ["micro_f1"] * 3)):
        means: Any = precision_recall_fscore_support(
            labels, predicted, labels=[0, 1, 2], average=average, zero_division=0
        )
        np.testing.assert_allclose([values[name] for name in names], means[:3])


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    confidences, right = [0.9, 0.9, 0.9, 0.9, 0.61, 0.61], [True, True, True, False, False, True]
    probabilities = np.array([[1 - each, each] for each in confidences])
    totals = class_items(np.array(right, np.int64), probabilities).totals()
    assert defined_metrics(totals)["calibration_error"] == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.11)
    low, high = reliability(np.array(confidences), np.array(right))
    assert (low.texts, low.confidence, low.accuracy) == (2, pytest.approx(0.61), 0.5)
    assert (high.texts, high.confidence, high.accuracy) == (4, pytest.approx(0.9), 0.75)
    assert low.low <= 0.61 <= low.high <= high.low <= 0.9 <= high.high


@pytest.mark.skipif(not SACREBLEU, reason="sacrebleu is not installed")
def test_scores_of_translations_are_sacrebleus_with_its_signature() -> None:
    import sacrebleu
    from sacrebleu.metrics import BLEU

    random.seed(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "off", "mat", "hill"]
    references = [" ".join(random.choices(words, k=8)) for _ in range(40)]
    made = [" ".join(random.choice([word, *words[:3]]) for word in each.split()) for each in references]
    items = Items(translation_columns(made, references))
    found = estimates_of(items)
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(made, [references]).score, rel=1e-12)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(made, [references]).score, rel=1e-12)
    theirs: Any = BLEU(references=[references]).corpus_score(made, None, n_bootstrap=1000)
    assert found["bleu"].interval is not None
    low, high = found["bleu"].interval
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert signature_of("bleu").startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    wrong = Items(translation_columns(["", "a"], ["x y", "z"])).totals()
    assert [defined_metrics(wrong)[name] for name in ("bleu", "chrf")] == [0, 0]


@pytest.mark.skipif(SACREBLEU, reason="sacrebleu is installed")
def test_without_sacrebleu_the_sentence_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"pip install.*\[eval\]"):
        translation_columns(["a"], ["b"])
