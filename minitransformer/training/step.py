"""One update of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitransformer.text.batches import TrainingBatch
from minitransformer.training.experts import ExpertBalance
from minitransformer.training.light import LightOptimizer
from minitransformer.training.objectives import Objective
from minitransformer.training.precision import Precision
from minitransformer.training.probe import NO_PROBE, Probe


@dataclass(frozen=True)
class StepResult:
    """The mean loss in nats a target, the norm of its gradient before clipping, and whether both were finite.

    To read one of them is to wait for the device. `measured` is what a probe found out, if it looked.
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
    probe: Probe = NO_PROBE,
) -> StepResult:
    """Descend along the gradient of the mean loss over the targets of all micro-batches together.

    The sum over each micro-batch is divided by the number of targets in all of them, so that k micro-batches give what
    one batch would; experts are balanced beside it. If the loss or a gradient is infinite or NaN, the weights stay as
    they are.
    """
    counts = [batch.num_targets for batch in micro_batches]  # before they go to the device, which would be waited for
    targets = sum(counts)
    total = torch.zeros((), device=precision.device)
    for batch, count in zip(micro_batches, counts, strict=True):
        batch = batch.to(precision.device, non_blocking=True)
        with precision.autocast():
            loss = objective.loss_sum(model, batch) / targets
            total += loss.detach()
            loss = loss + balance.loss() * count / targets
        precision.backward(loss)
    precision.unscale(optimizers)
    probe.before_update()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = torch.isfinite(total + grad_norm)
    precision.update(optimizers, skip=(~finite).float())
    model.zero_grad(set_to_none=True)
    return StepResult(total, grad_norm, finite)
