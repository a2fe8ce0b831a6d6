"""Training data that a compressed model is fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn

from minitransformer.errors import UserError
from minitransformer.text.datasets import PreparedData
from minitransformer.training.config import RunConfig
from minitransformer.training.loader import Loader


class Calibration:
    """The first batches of a run's training data, of at least so many `tokens`; always the same ones.

    Raises `UserError` for data with fewer.
    """

    def __init__(self, config: RunConfig, data: PreparedData, tokens: int) -> None:
        self.loader = Loader.of_run(config, data)
        if (there := data.num_tokens("train")) < tokens:
            raise UserError(
                f"calibration reads {tokens:,} tokens, and the training data has {there:,}: "
                "give more --data, or lower --calibration-tokens"
            )
        self.batches: list[Any] = []
        for step in count():
            self.batches += self.loader.training_batches(step)
            if sum(batch.num_tokens for batch in self.batches) >= tokens:
                break

    @property
    def tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    @torch.no_grad()
    def run(self, model: nn.Module) -> float:
        """A forward pass of `model` over every batch; the loss in nats per target."""
        nats = sum(float(self.loader.objective.loss_sum(model, batch)) for batch in self.batches)
        return nats / sum(batch.num_targets for batch in self.batches)

    def run_with_gradients(self, model: nn.Module) -> None:
        """A forward and a backward pass over every batch; the gradients of weights are dropped after each."""
        for batch in self.batches:
            self.loader.objective.loss_sum(model, batch).backward()
            model.zero_grad(set_to_none=True)


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Removes the hooks with these `handles` at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
