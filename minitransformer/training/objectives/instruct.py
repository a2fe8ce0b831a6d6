"""Learning to answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.text.batches import IGNORE
from minitransformer.text.chat_template import ChatTemplate
from minitransformer.text.datasets import Conversations, PreparedData
from minitransformer.text.packing import PackedBatch
from minitransformer.training.objectives.base import Objective, Score
from minitransformer.training.objectives.cross_entropy import score_tokens, summed_loss


class Instruct(Objective, name="instruct"):
    """−Σ log p(token of an answer | all before it), the token that ends the answer included; a text is all answer.

    Radford et al. 2018 (GPT), section 3.3; loss on answers only: Wang et al. 2022 (Self-Instruct, arXiv 2212.10560),
    section 2.3; several conversations in a row: Krell et al. 2021 (arXiv 2107.02027).
    """

    topologies = frozenset({"decoder"})
    dataset = Conversations
    batch_type = PackedBatch
    special_tokens = ChatTemplate.control_tokens
    predicts_text = False

    def loss_sum(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        loss: Tensor = self._output(model, batch, summed_loss)
        return loss

    def score(self, model: nn.Module, batch: PackedBatch) -> Score:
        """An answer is exact if greedy decoding gives it, which sees the same tokens as long as it is correct."""
        nats, right = self._output(model, batch, score_tokens)
        return Score(nats, right.sum(), exact_answers(right, batch))

    def _output(self, model: Any, batch: PackedBatch, measure: Any) -> Any:
        return model(batch.inputs, readout=partial(measure, targets=batch.targets), documents=batch.documents)

    def examples(self, data: PreparedData, batch: PackedBatch, count: int) -> list[list[int]]:
        """The prompts of the first answers: conversations up to where the first one begins."""
        found = []
        for inputs, targets, documents in zip(batch.inputs, batch.targets, batch.documents, strict=True):
            for number in range(1, int(documents.max()) + 1):
                of_it = documents == number
                before = int((targets[of_it] != IGNORE).int().argmax()) + 1
                found.append(inputs[of_it][:before].tolist())
        return found[:count]


def exact_answers(right: Tensor, batch: PackedBatch) -> Tensor:
    """[conversations] whether every target of each is `right` [batch, length]."""
    is_target = batch.targets != IGNORE
    rows = torch.arange(len(right), device=right.device)[:, None]
    most = int(batch.documents.max()) + 1
    numbers = (rows * most + batch.documents)[is_target]
    targets = torch.bincount(numbers, minlength=most * len(right))
    return torch.bincount(numbers[right[is_target]], minlength=most * len(right))[targets > 0] == targets[targets > 0]
