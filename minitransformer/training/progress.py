"""How far a run has come, and what happened since its last record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitransformer.training.learner import Learner
from minitransformer.training.machine import peak_flops
from minitransformer.training.step import StepResult


@dataclass
class Progress:
    """How far a run has come: part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    validated_step: int = 0
    validations_since_best: int = 0
    first_loss: float = math.inf
    skipped_step: int = 0
    """the first step whose loss or gradient was not finite, since validation was last better than ever; 0 for none"""

    def note(self, validation_loss: float) -> None:
        """A validation at this step had this loss, which others of the run may be compared with."""
        self.validated_step = self.step
        if not validation_loss < self.best_loss:
            self.validations_since_best += 1
            return
        self.best_loss, self.best_step, self.validations_since_best = validation_loss, self.step, 0
        if validation_loss < self.first_loss:
            self.skipped_step = 0


class Meter:
    """Loss, gradient norm and speed between two records; what steps found out stays on the device until it is read."""

    def __init__(self, learner: Learner, progress: Progress) -> None:
        self.learner, self.progress = learner, progress
        # Now, before the first step, the device has room for the matrices of the measurement.
        self._peak_flops = peak_flops(learner.machine.device, learner.precision.dtype)
        self._flops_per_token = learner.model.flops_per_token(learner.config.sequence_length)
        self._unread: list[Tensor] = []
        self._begin()

    def _begin(self) -> None:
        self._first = self.progress.step, self.progress.tokens, self.progress.seconds
        self._losses: list[float] = []
        self._grad_norms: list[float] = []

    def add(self, result: StepResult) -> None:
        """Note a step, without waiting for the device."""
        self._unread.append(torch.stack([result.loss, result.grad_norm, result.finite.to(result.loss.dtype)]))

    def read(self) -> list[float | None]:
        """Wait for the device; the loss of each step since the last reading, None if that was skipped."""
        figures = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        self._losses += [loss for loss, _, finite in figures if finite]
        self._grad_norms += [norm for _, norm, finite in figures if finite]
        return [loss if finite else None for loss, _, finite in figures]

    def record(self) -> dict[str, Any]:
        """What happened since the last record, as far as it was read; the next one begins here."""
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
    """Their mean; None for no values, which JSON can say and NaN it cannot."""
    return sum(values) / len(values) if values else None
