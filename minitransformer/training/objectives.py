"""What a model learns: one objective is one class, which makes the batches and their loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.registry import Registered
from minitransformer.text.batches import IGNORE, Batch, SequentialWindows, ShuffledWindows
from minitransformer.text.prepare import PreparedText


class Objective(Registered, kind="objective"):
    """Batches of a prepared text, and the loss of a model on them."""

    def __init__(self, text: PreparedText, *, context_length: int, seed: int) -> None:
        self.text, self.context_length, self.seed = text, context_length, seed

    def training_batch(self, index: int, size: int) -> Batch:
        """The batch of `size` sequences for step `index`: the same one whenever it is asked for."""
        raise NotImplementedError

    def validation_batches(self, size: int) -> Iterable[Batch]:
        """The whole validation split, once."""
        raise NotImplementedError

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss in nats, summed over the targets of `batch` that count."""
        raise NotImplementedError


class Causal(Objective, name="causal"):
    """−Σ log p(token | tokens before it). Bengio et al. 2003, section 2; Radford et al. 2018, equation 1."""

    def training_batch(self, index: int, size: int) -> Batch:
        return ShuffledWindows(self.text.train, self.context_length, size, self.seed).batch(index)

    def validation_batches(self, size: int) -> Iterable[Batch]:
        return SequentialWindows(self.text.validation, self.context_length, size)

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.inputs)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
