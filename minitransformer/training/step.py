"""One update of the weights, and one pass over the validation split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitransformer.text.batches import IGNORE, Batch
from minitransformer.training.objectives import Objective
from minitransformer.training.precision import Precision


@dataclass(frozen=True)
class StepResult:
    """The mean loss in nats a target, the norm of its gradient before clipping, and whether both were finite."""

    loss: Tensor
    grad_norm: Tensor
    finite: bool


def training_step(
    model: nn.Module,
    objective: Objective,
    micro_batches: Iterable[Batch],
    optimizers: list[torch.optim.Optimizer],
    precision: Precision,
    *,
    grad_clip: float,
) -> StepResult:
    """Descend along the gradient of the mean loss over the targets of all micro-batches together.

    The sum over each micro-batch is divided by the number of targets in all of them, so that k micro-batches give what
    one batch would. If the loss or a gradient is infinite or NaN, the weights stay as they are.
    """
    micro_batches = list(micro_batches)
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in micro_batches)
    total = torch.zeros((), device=precision.device)
    for batch in micro_batches:
        batch = batch.to(precision.device, non_blocking=True)
        with precision.autocast():
            loss = objective.loss_sum(model, batch) / targets
        precision.backward(loss)
        total += loss.detach()
    precision.unscale(optimizers)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = bool(torch.isfinite(total + grad_norm))
    precision.update(optimizers, finite=finite)
    model.zero_grad(set_to_none=True)
    return StepResult(total, grad_norm, finite)


@dataclass(frozen=True)
class Validation:
    """Loss over a whole split: in nats a target, as perplexity, and in bits a byte of text."""

    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, {self.bits_per_byte:.4f} bits per byte"


@torch.no_grad()
def validate(
    model: nn.Module, objective: Objective, precision: Precision, *, batch_size: int, text_bytes: int
) -> Validation:
    """The loss of every target of the validation split, each predicted once from the tokens before it in its window.

    Bits per byte, Σ nats / (ln 2 · bytes), compares models with different tokenizers.
    """
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    targets = 0
    for batch in objective.validation_batches(batch_size):
        targets += int((batch.targets != IGNORE).sum())
        with precision.autocast():
            nats += objective.loss_sum(model, batch.to(precision.device)).double().cpu()
    model.train(was_training)
    return Validation(float(nats) / targets, float(nats) / (math.log(2) * text_bytes))
