"""The progress of a run, and the metrics since its last record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    def note(self, validation_loss: float) -> None:
        """Record the loss of a validation at this step, comparable with the others of the run."""
        self.validated_step = self.step
        if not validation_loss < self.best_loss:
            self.validations_since_best += 1
            return
        self.best_loss, self.best_step, self.validations_since_best = validation_loss, self.step, 0
        if validation_loss < self.first_loss:
            self.skipped_step = 0


class Meter:
    """Loss, gradient norm and speed between two records; results stay on the device until `read`."""

    def __init__(self, learner: Learner, progress: Progress) -> None:
        self.learner, self.progress = learner, progress
        # Before the first step, the device has memory for the measurement's matrices.
        self._peak_flops = learner.ranks.processes * peak_flops(learner.machine.device, learner.precision.dtype)
        self._flops_per_token = learner.model.flops_per_token(learner.config.sequence_length)
        self._unread: list[Tensor] = []
        self._begin()

    def _begin(self) -> None:
        self._first = self.progress.step, self.progress.tokens, self.progress.seconds
        self._losses: list[float] = []
        self._grad_norms: list[float] = []

    def add(self, result: StepResult) -> None:
        """Add a step, without synchronising with the device."""
        self._unread.append(torch.stack([result.loss, result.grad_norm, result.finite.to(result.loss.dtype)]))

    def read(self) -> list[float | None]:
        """Synchronise with the device; returns the loss of each step since the last call, None if it was skipped."""
        figures = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        self._losses += [loss for loss, _, finite in figures if finite]
        self._grad_norms += [norm for _, norm, finite in figures if finite]
        return [loss if finite else None for loss, _, finite in figures]

    def record(self) -> dict[str, Any]:
        """The metrics since the last record, as far as read; starts the next record."""
        steps, tokens, seconds = self.progress.step, self.progress.tokens, self.progress.seconds
        first_step, first_token, first_second = self._first
        tokens_per_second = (tokens - first_token) / (seconds - first_second)
        record = {
            "step": steps,
            "loss": _mean(self._losses),
            "grad_norm": _mean(self._grad_norms),
            "skipped_steps": steps - first_step - len(self._losses),
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
