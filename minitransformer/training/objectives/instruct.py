"""Learning to answer."""

from __future__ import annotations

from functools import partial
from typing import Any

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
        return Score(nats, right, whole=True)

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
