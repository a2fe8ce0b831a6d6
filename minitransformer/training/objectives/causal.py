"""Predicting the next token."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from minitransformer.text.batches import Batch
from minitransformer.text.datasets import PlainText
from minitransformer.training.objectives.base import Objective, Score
from minitransformer.training.objectives.cross_entropy import summed_loss, token_losses


class Causal(Objective, name="causal"):
    """−Σ log p(token | tokens before it). Bengio et al. 2003, section 2; Radford et al. 2018, equation 1."""

    topologies = frozenset({"decoder"})
    dataset = PlainText

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch.inputs, readout=partial(summed_loss, targets=batch.targets))
        return loss

    def score(self, model: nn.Module, batch: Batch) -> Score:
        return Score(model(batch.inputs, readout=partial(token_losses, targets=batch.targets)))
