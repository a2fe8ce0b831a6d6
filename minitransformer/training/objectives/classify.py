"""Predicting the class of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minitransformer.settings import setting
from minitransformer.text.batches import TrainingBatch
from minitransformer.text.datasets import Labels, PreparedData
from minitransformer.text.datasets.label_preparation import PreparedLabels
from minitransformer.text.pair_batches import PairBatch
from minitransformer.training.objectives.base import BatchKey, Objective, Score


@dataclass(frozen=True)
class LabelBatch(TrainingBatch):
    """Padded texts, the class of each, and its weight in the training loss."""

    inputs: Int64[Tensor, "batch length"]
    is_token: Bool[Tensor, "batch length"]
    targets: Int64[Tensor, "batch"]
    weights: Float[Tensor, "batch"]

    @property
    def item_tokens(self) -> Tensor:
        return self.is_token.sum(1)


class Classify(Objective, name="classify"):
    """−Σ w log p(class | text), where w is 1, or texts / (classes · texts of its class), by which classes count alike.

    Devlin et al. 2018 (BERT, arXiv 1810.04805), section 4.1; Radford et al. 2018 (GPT), equation 4. Balanced weights:
    King and Zeng 2001, "Logistic regression in rare events data", section 4.2. Validation does not weight.
    """

    @dataclass(frozen=True)
    class Settings:
        class_weights: Literal["equal", "balanced"] = setting(
            "equal",
            flag="class_weights",
            changes_task=True,
            help="weights of texts in the training loss; balanced lets all classes count alike",
        )

    settings: Settings
    topologies = frozenset({"encoder-classifier", "decoder-classifier"})
    classifier_of = {  # noqa: RUF012 (never changed)
        "encoder": "encoder-classifier",
        "encoder-headless": "encoder-classifier",
        "decoder": "decoder-classifier",
    }
    dataset = Labels
    batch_type = LabelBatch
    fixed_shapes = False
    predicts_text = False
    distills = False
    has_baseline = True

    def make_batch(self, batch: PairBatch, data: PreparedLabels, key: BatchKey) -> LabelBatch:  # type: ignore[override]
        targets = batch.targets[:, 0].contiguous()
        weights = torch.ones(len(targets))
        if self.settings.class_weights == "balanced":
            counts = torch.from_numpy(data.class_counts).float()
            weights = (counts.sum() / (len(counts) * counts))[targets]
        return LabelBatch(batch.source, batch.source_is_token, targets, weights)

    def loss_sum(self, model: nn.Module, batch: LabelBatch) -> Tensor:
        logits = model(batch.inputs, is_token=batch.is_token).float()
        return (cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()

    def examples(self, data: PreparedData, batch: LabelBatch, count: int) -> list[list[int]]:
        rows = list(zip(batch.inputs, batch.is_token, strict=True))[:count]
        return [text[is_token].tolist() for text, is_token in rows]

    def score(self, model: nn.Module, batch: LabelBatch) -> Score:
        logits = model(batch.inputs, is_token=batch.is_token).float()
        nats = cross_entropy(logits, batch.targets, reduction="none")
        return Score(nats, probabilities=logits.softmax(-1))
