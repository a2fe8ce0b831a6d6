"""Sequence-to-sequence training with teacher forcing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from minitransformer.settings import setting
from minitransformer.text.datasets import Pairs, PreparedData
from minitransformer.text.pair_batches import PairBatch
from minitransformer.training.objectives.base import Objective, Score
from minitransformer.training.objectives.cross_entropy import score_tokens, summed_loss


@dataclass(frozen=True)
class SmoothedLoss:
    """The settings of `pair_loss`."""

    label_smoothing: float = setting(
        0.0, flag="label_smoothing", at_least=0, below=1, help="label smoothing ε of the training loss"
    )


class Seq2Seq(Objective, name="seq2seq"):
    """−Σ log p(target token | target before it, source): teacher forcing.

    Training uses label smoothing ε: 1 − ε for the target, ε spread uniformly over the vocabulary (Szegedy et al.
    2015, arXiv 1512.00567, section 7; Vaswani et al. 2017, section 5.4). Validation does not.
    """

    @dataclass(frozen=True)
    class Settings(SmoothedLoss): ...

    settings: Settings
    topologies = frozenset({"encoder-decoder", "rnn"})
    dataset = Pairs
    batch_type = PairBatch
    fixed_shapes = False

    def score(self, model: nn.Module, batch: PairBatch) -> Score:
        return score_pairs(model, batch)

    def loss_sum(self, model: nn.Module, batch: PairBatch) -> Tensor:
        return pair_loss(model, batch, self.settings.label_smoothing)

    def examples(self, data: PreparedData, batch: PairBatch, count: int) -> list[list[int]]:
        rows = list(zip(batch.source, batch.source_is_token, strict=True))[:count]
        return [source[is_token].tolist() for source, is_token in rows]


def pair_loss(model: Any, batch: PairBatch, label_smoothing: float) -> Tensor:
    """−Σ log p of the targets by teacher forcing, with label smoothing."""
    readout = partial(summed_loss, targets=batch.targets, label_smoothing=label_smoothing)
    return model(batch.source, batch.inputs, source_is_token=batch.source_is_token, readout=readout)


def score_pairs(model: Any, batch: PairBatch) -> Score:
    """The loss, accuracy and exact matches of `model` by teacher forcing.

    An exact match equals greedy decoding, which sees the same prefix as long as it is correct.
    """
    readout = partial(score_tokens, targets=batch.targets)
    nats, right = model(batch.source, batch.inputs, source_is_token=batch.source_is_token, readout=readout)
    return Score(nats, right, whole=True)
