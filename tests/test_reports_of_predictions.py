"""What `evaluate` says of classes and of translations: figures of their definitions, and those of sacrebleu."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.evaluation.class_report import calibration_error, class_report
from minitransformer.evaluation.translations import corpus_scores


def test_precision_recall_and_f1_are_those_of_their_definitions() -> None:
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    report = class_report(["a", "b", "c"], labels, np.eye(3)[predicted].tolist())
    assert report.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    a, b, c = report.classes
    assert (a.precision, a.recall, a.texts) == (2 / 4, 2 / 3, 3)
    assert a.f1 == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert (b.precision, b.recall, b.f1) == (1 / 2, 1 / 2, 1 / 2)
    assert (c.precision, c.recall, c.f1) == (0, 0, 0)
    assert report.calibration_error == pytest.approx(3 / 6)
    assert report.rows()[1] == ["a", "50.0%", "66.7%", "57.1%", "3", "2", "1", "0"]


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_they_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, predicted = [label for label, _ in pairs], [each for _, each in pairs]
    report = class_report(["a", "b", "c"], labels, np.eye(3)[predicted].tolist())
    assert (report.confusion == confusion_matrix(labels, predicted, labels=[0, 1, 2])).all()
    theirs: Any = precision_recall_fscore_support(labels, predicted, labels=[0, 1, 2], zero_division=0)
    ours = [[getattr(each, name) for each in report.classes] for name in ("precision", "recall", "f1", "texts")]
    np.testing.assert_allclose(ours, theirs)


def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy() -> None:
    confidences = np.array([0.9, 0.9, 0.9, 0.9, 0.61, 0.61])
    right = np.array([True, True, True, False, False, True])
    assert calibration_error(confidences, right) == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.11)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed")
def test_scores_of_translations_are_sacrebleus_with_its_signature() -> None:
    import sacrebleu

    made, references = ["the cat sat on the mat", "a dog ran off"] * 9, ["the cat sat on a mat", "the dog ran off"] * 9
    bleu, chrf = corpus_scores(made, references)
    assert bleu.score == sacrebleu.corpus_bleu(made, [references]).score
    assert chrf.score == sacrebleu.corpus_chrf(made, [references]).score
    assert bleu.low < bleu.score < bleu.high
    assert "tok:13a" in bleu.signature
    assert [each.score for each in corpus_scores(["", "a"], ["x y", "z"])] == [0, 0]


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is not None, reason="sacrebleu is installed")
def test_without_sacrebleu_the_sentence_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match=r"pip install.*\[eval\]"):
        corpus_scores(["a"], ["b"])
