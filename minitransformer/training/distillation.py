"""Learning from the predictions of a larger model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from minitransformer.models.model import Model
from minitransformer.text.batches import IGNORE
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.cross_entropy import cross_entropy_sum, sum_in_chunks, summed_loss


class Distillation:
    """(1 − w) times the loss of `objective`, and w T² Σ KL(teacher ‖ student) at temperature T, over the same targets.

    Hinton et al. 2015 (arXiv 1503.02531), section 2. The teacher is given the same inputs, and is not trained.
    """

    def __init__(self, objective: Objective, teacher: Model, weight: float, temperature: float) -> None:
        self.objective, self.teacher = objective, teacher.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss in nats, summed over the targets of `batch`."""
        return self.objective.loss_sum(partial(self._run_both, model), batch)  # type: ignore[arg-type]

    def _run_both(self, model: nn.Module, *inputs: Any, readout: Any, **named: Any) -> Tensor:
        assert readout.func is summed_loss
        with torch.no_grad():
            head, hidden = self.teacher(*inputs, readout=lambda head, hidden: (head, hidden), **named)
        both = partial(
            distilled_loss,
            **readout.keywords,
            teacher_head=head,
            teacher_hidden=hidden,
            weight=self.weight,
            temperature=self.temperature,
        )
        loss: Tensor = model(*inputs, readout=both, **named)
        return loss


def distilled_loss(
    head: nn.Module,
    hidden: Float[Tensor, "*batch d_model"],
    targets: Int64[Tensor, "*batch"],
    *,
    teacher_head: nn.Module,
    teacher_hidden: Float[Tensor, "*batch d_teacher"],
    weight: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss of `Distillation`, from the hidden states of both models; the logits of both are made in chunks."""

    def loss(logits: Tensor, targets: Tensor, teacher_hidden: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher_head(teacher_hidden).float() / temperature).log_softmax(-1)
        found = (logits.float() / temperature).log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)[targets != IGNORE].sum()
        own = cross_entropy_sum(logits, targets, label_smoothing)
        return (1 - weight) * own + weight * temperature**2 * divergence

    return sum_in_chunks(head, hidden.flatten(0, -2), loss, targets.flatten(), teacher_hidden.flatten(0, -2))
