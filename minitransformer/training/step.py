"""One training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitransformer.text.batches import TrainingBatch
from minitransformer.training.experts import ExpertBalance
from minitransformer.training.light import LightOptimizer
from minitransformer.training.memory import MicroBatches
from minitransformer.training.objectives import Objective
from minitransformer.training.precision import Precision
from minitransformer.training.probe import NO_PROBE, Probe


@dataclass(frozen=True)
class StepResult:
    """The mean loss in nats per target, the gradient norm before clipping, and whether both are finite.

    Reading them synchronises with the device. `measured` are the figures of the probe, if any.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    measured: Mapping[str, float | None] = field(default_factory=dict)


def training_step(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[TrainingBatch],
    optimizers: list[LightOptimizer],
    precision: Precision,
    *,
    grad_clip: float,
    balance: ExpertBalance,
    memory: MicroBatches,
    seed: int,
    probe: Probe = NO_PROBE,
) -> StepResult:
    """One optimizer step on the mean loss over the targets of all micro-batches.

    If the loss or a gradient is infinite or NaN, the step is skipped. Raises `OutOfMemory`.
    """

    def add(parts: Sequence[TrainingBatch]) -> Tensor:
        torch.manual_seed(seed)
        return add_gradients(model, objective, parts, precision, balance)

    def drop() -> None:
        balance.loss()
        model.zero_grad(set_to_none=True)

    total = memory.compute(micro_batches, add, drop)
    precision.unscale(optimizers)
    probe.before_update()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = torch.isfinite(total + grad_norm)
    precision.update(optimizers, skip=(~finite).float())
    model.zero_grad(set_to_none=True)
    return StepResult(total, grad_norm, finite)


def add_gradients(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[TrainingBatch],
    precision: Precision,
    balance: ExpertBalance,
) -> Tensor:
    """Add the gradients of all micro-batches, and return the mean loss over all of their targets.

    The sum over each micro-batch is divided by the number of targets in all of them, so that k micro-batches equal
    one batch; the load-balancing loss of experts is added to the gradients.
    """
    counts = [batch.num_targets for batch in micro_batches]  # on the CPU, to avoid synchronising with the device
    targets = sum(counts)
    total = torch.zeros((), device=precision.device)
    for batch, count in zip(micro_batches, counts, strict=True):
        batch = batch.to(precision.device, non_blocking=True)
        with precision.autocast():
            loss = objective.loss_sum(model, batch) / targets
            total += loss.detach()
            loss = loss + balance.loss() * count / targets
        precision.backward(loss)
    return total
