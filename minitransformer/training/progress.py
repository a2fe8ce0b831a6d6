"""The progress of a run, and the metrics since its last record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minitransformer.errors import StorageError
from minitransformer.records import checked_fields, shown, type_hints
from minitransformer.training.learner import Learner, StepResult
from minitransformer.training.machine import peak_flops


@dataclass
class Progress:
    """The progress of a run, saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    validated_step: int = 0
    validations_since_best: int = 0
    first_loss: float = math.inf
    skipped_step: int = 0
    """the first step with a non-finite loss or gradient since the best validation; 0 for none"""
    steps_without_update: int = 0
    """latest steps in a row that were skipped because the loss or gradient was not finite"""
    steps_in_spike: int = 0
    """latest steps in a row with a loss far above those before"""
    bad_since: int = 0
    """the first of these steps; 0 for none"""
    diverged_step: int = 0
    """the step in which there were too many of them; 0 for none"""
    recent_losses: list[float] = field(default_factory=list)
    """losses that the next one is compared with to find a spike"""
    record_begin: tuple[int, int, float] | None = None
    """steps, tokens and seconds at the last record of metrics; None in old checkpoints"""
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    """those since then"""
    rollbacks: int = 0
    """how often the run went back to a checkpoint"""

    def forget_best(self) -> None:
        """Forget the best validation, whose checkpoint is lost."""
        self.best_loss, self.best_step, self.validations_since_best = math.inf, 0, 0

    @classmethod
    def from_json(cls, saved: Any, origin: str) -> Progress:
        """The progress `saved` in the checkpoint `origin`; raises `StorageError` if it is none."""
        record: type = cls
        if not isinstance(saved, dict) or not saved.keys() <= type_hints(record).keys():
            raise StorageError(f"{origin} has a damaged progress ({shown(saved)}): choose another --checkpoint")
        return cls(**checked_fields(record, saved, origin))

    def note(self, validation_loss: float) -> None:
        """Record the loss of a validation at this step, comparable with the others of the run."""
        self.validated_step = self.step
        if not validation_loss < self.best_loss:
            self.validations_since_best += 1
            return
        self.best_loss, self.best_step, self.validations_since_best = validation_loss, self.step, 0
        if validation_loss < self.first_loss:
            self.skipped_step = 0


@dataclass(frozen=True)
class StepFigures:
    """The loss and the gradient norm of a step, and the loss scale in it and after it."""

    loss: float
    grad_norm: float
    finite: bool
    loss_scale: float
    next_scale: float

    @property
    def lowered_scale(self) -> bool:
        """Whether the step was skipped only because the loss scale of float16 was too large, as it may often be.

        Below a scale of 1, a gradient that overflows is not due to scaling.
        """
        return not self.finite and math.isfinite(self.loss) and 1 < self.loss_scale > self.next_scale


class Meter:
    """Loss, gradient norm and speed between two records; results stay on the device until `read`.

    What is read is in `progress`, so that an interruption between two records changes neither.
    """

    def __init__(self, learner: Learner, progress: Progress) -> None:
        self.learner, self.progress = learner, progress
        # Before the first step, the device has memory for the measurement's matrices.
        self._peak_flops = learner.ranks.processes * peak_flops(learner.machine.device, learner.precision.dtype)
        self._flops_per_token = learner.model.flops_per_token(learner.config.sequence_length)
        self._unread: list[Tensor] = []
        self._loss_scale = learner.precision.loss_scale()
        if progress.record_begin is None:
            self._begin()

    def _begin(self) -> None:
        progress = self.progress
        progress.record_begin = progress.step, progress.tokens, progress.seconds
        progress.losses, progress.grad_norms = [], []

    def add(self, result: StepResult) -> None:
        """Add a step, without synchronising with the device."""
        scale, self._loss_scale = self._loss_scale, self.learner.precision.loss_scale()
        figures = result.loss, result.grad_norm, result.finite, scale, self._loss_scale
        self._unread.append(torch.stack([figure.to(result.loss.dtype) for figure in figures]))

    def read(self) -> list[StepFigures]:
        """Synchronise with the device; returns the figures of each step since the last call."""
        read = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        figures = [StepFigures(loss, norm, bool(finite), *scales) for loss, norm, finite, *scales in read]
        progress, finite = self.progress, [each for each in figures if each.finite]
        progress.losses = progress.losses + [each.loss for each in finite]
        progress.grad_norms = progress.grad_norms + [each.grad_norm for each in finite]
        return figures

    def record(self) -> dict[str, Any]:
        """The metrics since the last record, as far as read; starts the next record."""
        progress = self.progress
        assert progress.record_begin is not None
        steps, tokens, seconds = progress.step, progress.tokens, progress.seconds
        first_step, first_token, first_second = progress.record_begin
        tokens_per_second = (tokens - first_token) / (seconds - first_second)
        record = {
            "step": steps,
            "loss": _mean(progress.losses),
            "grad_norm": _mean(progress.grad_norms),
            "skipped_steps": steps - first_step - len(progress.losses),
            "lr": self.learner.learning_rate,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._flops_per_token / self._peak_flops,
            "seconds": seconds,
            "seconds_left": (self.learner.config.training.steps - steps)
            * (seconds - first_second)
            / (steps - first_step),
        }
        self._begin()
        return record


def _mean(values: list[float]) -> float | None:
    """The mean; None for no values, as JSON has no NaN."""
    return sum(values) / len(values) if values else None
