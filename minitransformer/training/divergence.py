"""Detecting divergence of training, and finding a checkpoint to continue from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minitransformer.models.model import Model, build_model
from minitransformer.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_step,
    checkpoints_in,
    damage,
    load_model_weights,
    unique_tensors,
)
from minitransformer.training.config import TrainingConfig
from minitransformer.training.learner import Learner
from minitransformer.training.progress import Progress
from minitransformer.training.shards import local_part

# float16 needs some skipped steps to find its loss scale; more never recover.
MOST_STEPS_WITHOUT_UPDATE = 20
NOISE = 1.02
"""tolerance for losses on different batches or dropout masks"""


class NonFiniteTraining(Exception):
    """The loss or gradient was infinite or NaN for many steps in a row, or the weights became so."""


class DivergenceWatch:
    """Counts the steps that were skipped because the loss or gradient was infinite or NaN, and stops the run.

    Its checks raise `NonFiniteTraining` with a remedy; `finish_saving` is called before it looks for checkpoints.
    """

    def __init__(self, folder: Path, learner: Learner, progress: Progress, finish_saving: Callable[[], object]) -> None:
        self.folder, self.learner, self.progress, self._finish_saving = folder, learner, progress, finish_saving
        self._steps_without_update = 0

    def note(self, losses: Sequence[float | None]) -> None:
        """The losses of the latest steps, None for those that were skipped."""
        for step, loss in enumerate(losses, start=self.progress.step - len(losses) + 1):
            if loss is None:
                self._steps_without_update += 1
                self.progress.skipped_step = self.progress.skipped_step or step
            else:
                self._steps_without_update = 0
                self.progress.first_loss = loss if self.progress.first_loss == math.inf else self.progress.first_loss

    def check(self) -> None:
        """Raises if a step was skipped and the weights are not finite, or too many steps in a row were skipped."""
        if self._steps_without_update:
            self.check_finite()
        if self._steps_without_update >= MOST_STEPS_WITHOUT_UPDATE:
            raise self._diverged(
                f"{self._steps_without_update} steps in a row had an infinite or NaN loss or gradient, the last one "
                f"step {self.progress.step}; none changed the weights"
            )

    def check_finite(self) -> None:
        """Raises on all ranks if a weight or an optimizer state is not finite on one of them."""
        kept = list(unique_tensors(self.learner.model).values())
        for optimizer in self.learner.optimizers:
            kept += [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
        if self.learner.ranks.any(not are_finite([local_part(each) for each in kept if each.is_floating_point()])):
            raise self._diverged(
                f"after step {self.progress.step}, the weights or the optimizer state are infinite or NaN, "
                "and are not saved"
            )

    def _diverged(self, what: str) -> NonFiniteTraining:
        self._finish_saving()
        sound = sound_checkpoint(self.folder / CHECKPOINTS, self.learner, self.progress.first_loss)
        training, precision = self.learner.config.training, self.learner.machine.precision
        return NonFiniteTraining(f"{what}; {remedy(self.folder, training, sound, precision)}")


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers in `tensors`, on one device, are finite; synchronises once."""
    if torch.stack(torch._foreach_norm(list(tensors))).isfinite().all():
        return True
    return all(tensor.isfinite().all() for tensor in tensors)  # the norm of large numbers overflows


def sound_checkpoint(checkpoints: Path, learner: Learner, first_loss: float) -> Path | None:
    """The newest checkpoint in `checkpoints` that training can continue from; None if there is none.

    Its next step has a finite gradient and a loss of at most `first_loss`, the run's first, in nats per target.
    """
    model = build_model(learner.config.model).to(learner.machine.device)
    for path in reversed(checkpoints_in(checkpoints)):
        if damage(path) is not None:
            continue
        load_model_weights(path, model)
        if _next_loss(model, learner, checkpoint_step(path)) <= NOISE * first_loss:
            return path
    return None


def _next_loss(model: Model, learner: Learner, step: int) -> float:
    """The mean loss of `model` in the step after `step`; NaN if its gradient is not finite."""
    device = learner.machine.device
    batches = [batch.to(device) for batch in learner.loader.training_batches(step)]
    targets, total = sum(batch.num_targets for batch in batches), 0.0
    model.zero_grad(set_to_none=True)
    model.begin_step(step)
    for batch in batches:
        with learner.precision.autocast():
            loss = learner.objective.loss_sum(model, batch) / targets
        loss.backward()
        total += loss.item()
    finite = are_finite([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return total if finite else float("nan")


def remedy(folder: Path, training: TrainingConfig, sound: Path | None, precision: str) -> str:
    """What to do after divergence, with the checkpoint to continue from, if there is a usable one."""
    rates = " ".join(f"--{name.replace('_', '-')} {rate:g}" for name, rate in _lower_rates(training).items())
    other = "" if precision == "fp32" else ", or in another --precision, such as fp32"
    if sound is None:
        return f"no checkpoint is usable: train again with lower learning rates, such as {rates}{other}"
    path = shlex.quote(str(folder))
    return f"continue from before it: python train.py --resume {path} --checkpoint {sound.name} {rates}{other}"


def _lower_rates(training: TrainingConfig) -> dict[str, float]:
    """A tenth of the given learning rates, and at most the default ones."""
    given = {name: getattr(training, name) for name in ("lr", "embedding_lr", "head_lr")}
    rates = {name: min(rate / 10, TrainingConfig.lr) for name, rate in given.items() if rate is not None}
    return {**rates, "min_lr": 0.0} if training.min_lr > rates["lr"] else rates
