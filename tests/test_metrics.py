"""Metrics by name: what each says of a validation, and that a new one is told wherever the others are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from minitransformer.analysis.trials import recorded_metrics
from minitransformer.evaluation.items import Totals, join_items
from minitransformer.evaluation.metrics import Metric, metric_called, values_of
from minitransformer.text.batches import IGNORE, Batch
from minitransformer.training.objectives import Score
from minitransformer.training.validation import Validation

ALL = Totals(nats=6.0, targets=4, correct=3, texts=2, exact=1, bytes=3, majority_baseline=0.25)


def test_values_are_those_of_their_definitions() -> None:
    assert values_of(ALL) == {
        "validation_loss": 1.5,
        "perplexity": math.exp(1.5),
        "bits_per_byte": 6.0 / (math.log(2) * 3),
        "accuracy": 0.75,
        "macro_f1": None,
        "token_f1": None,
        "exact": 0.5,
        "majority_baseline": 0.25,
    }


def test_what_an_objective_does_not_ask_for_is_not_told() -> None:
    known = {name: value for name, value in values_of(Totals(nats=6.0, targets=4)).items() if value is not None}
    assert known.keys() == {"validation_loss", "perplexity"}
    assert str(Validation(values_of(Totals(nats=6.0, targets=4)))) == "loss 1.5000, perplexity 4.48"


def test_batches_add_up_to_totals() -> None:
    totals, found = Totals(), []
    batch = Batch(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 2, 3], [4, IGNORE, IGNORE]]))
    for nats in (1.0, 2.5):
        right = torch.tensor([[True, False, True], [True, False, False]])
        score = Score(nats * (batch.targets != IGNORE), right, whole=True)
        found.append(score.items(batch))
        totals.add(found[-1])
    assert totals == Totals(nats=14.0, targets=8, tokens=12, correct=6, texts=4, exact=2) == join_items(found).totals()
    assert {name: column.tolist() for name, column in found[1].columns.items()} == {
        **{"nats": [7.5, 2.5], "targets": [3, 1], "tokens": [3, 3]},
        **{"correct": [2, 1], "texts": [1, 1], "exact": [0, 1]},
    }


def test_a_validation_is_told_in_the_words_of_its_metrics() -> None:
    said = str(Validation(values_of(ALL)))
    assert said == (
        "loss 1.5000, perplexity 4.48, 2.8854 bits per byte, accuracy 75.0%, exact match 50.0%, "
        "majority-class baseline 25.0%"
    )


@pytest.fixture
def new_metric() -> Iterator[str]:
    class Surprise(Metric, name="surprise"):
        label, title, in_words = "surprise (nats)", "surprise", "surprise {:.1f}"
        lower_is_better = True

        @staticmethod
        def value(totals: Totals) -> float:
            return totals.nats

    yield Surprise.name
    del Metric.registry[Surprise.name]


def test_one_class_adds_a_metric_to_what_is_recorded_said_and_searched_by(new_metric: str) -> None:
    validation = Validation(values_of(ALL))
    assert validation.record()[new_metric] == 6.0
    assert str(validation).endswith("surprise 6.0")
    assert new_metric in recorded_metrics()
    assert metric_called(new_metric).label == "surprise (nats)"


def test_a_number_that_is_no_metric_has_its_name_for_a_label() -> None:
    assert metric_called("grad_norm").label == "grad norm"
    assert metric_called("grad_norm").lower_is_better is None
