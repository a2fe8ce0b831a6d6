"""Detecting divergence of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minitransformer.training.learner import Learner
from minitransformer.training.progress import Progress, StepFigures
from minitransformer.training.shards import local_part
from minitransformer.training.weights import unique_tensors


class Divergence(Exception):
    """What is wrong with the loss, the gradients or the weights, in words.

    `skipped` is the latest step if it was skipped; `is_finite` if only the loss is too high.
    """

    def __init__(self, what: str, *, skipped: StepFigures | None = None, is_finite: bool = False) -> None:
        super().__init__(what)
        self.skipped, self.is_finite = skipped, is_finite


class NonFiniteTraining(Exception):
    """The end of a run that has diverged: why, and what to do."""


class DivergenceWatch:
    """Finds steps in a row without an update, or in a spike of the loss, and weights that are not finite.

    Its checks raise `Divergence`. What it knows of the steps is in `progress`, so that a resumed run decides alike.
    """

    def __init__(self, learner: Learner, progress: Progress) -> None:
        self.learner, self.progress = learner, progress
        self.most_skipped = learner.config.training.max_skipped_steps
        self.save_every = learner.config.training.save_every
        self.policy = learner.config.training.on_spike.make()
        self._skipped: StepFigures | None = None

    def note(self, figures: Sequence[StepFigures]) -> None:
        """The figures of the latest steps; those after a divergence do not count."""
        for step, each in enumerate(figures, start=self.progress.step - len(figures) + 1):
            self._skipped = None if each.finite else each
            if not self.progress.diverged_step and not each.lowered_scale:
                self._note(step, each)

    def _note(self, step: int, figures: StepFigures) -> None:
        progress = self.progress
        if figures.finite:
            progress.steps_without_update = 0
            self._note_loss(figures.loss)
        else:
            progress.steps_without_update += 1
            progress.skipped_step = progress.skipped_step or step
        is_bad = progress.steps_without_update or progress.steps_in_spike
        progress.bad_since = (progress.bad_since or step) if is_bad else 0
        if self._was_skipped_too_often or progress.steps_in_spike >= self.policy.patience:
            progress.diverged_step = step

    def _note_loss(self, loss: float) -> None:
        progress = self.progress
        progress.first_loss = loss if progress.first_loss == math.inf else progress.first_loss
        if self.policy.is_high(loss, progress.recent_losses):
            progress.steps_in_spike += 1
            return
        progress.steps_in_spike = 0
        if self.policy.window:
            progress.recent_losses = [*progress.recent_losses, loss][-self.policy.window :]

    @property
    def _was_skipped_too_often(self) -> bool:
        return self.progress.steps_without_update >= self.most_skipped

    def check(self) -> None:
        """Raises `Divergence` if too many steps were bad, or a step was skipped and the weights are not finite."""
        progress = self.progress
        if progress.steps_without_update:
            self.check_finite()
        if not progress.diverged_step:
            return
        if self._was_skipped_too_often:
            raise Divergence(
                f"{progress.steps_without_update} steps in a row had an infinite or NaN loss or gradient, the last one "
                f"step {progress.diverged_step}; none changed the weights",
                skipped=self._skipped,
            )
        usual = math.fsum(progress.recent_losses) / len(progress.recent_losses)
        raise Divergence(
            f"{progress.steps_in_spike} steps in a row had a loss far above the mean of {usual:.4f} before them, the "
            f"last one step {progress.diverged_step}",
            is_finite=True,
        )

    def check_finite(self) -> None:
        """Raises `Divergence` on all ranks if a weight or an optimizer state is not finite on one of them."""
        kept = list(unique_tensors(self.learner.model).values())
        for optimizer in self.learner.optimizers:
            kept += [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
        if self.learner.ranks.any(not are_finite([local_part(each) for each in kept if each.is_floating_point()])):
            raise Divergence(
                f"after step {self.progress.step}, the weights or the optimizer state are infinite or NaN, "
                "and are not saved",
                skipped=self._skipped,
            )

    def needed_before(self) -> set[int]:
        """The steps before which a checkpoint must be kept, to continue from after a divergence."""
        progress = self.progress
        back = self.policy.needed_before(progress.bad_since or progress.step + 1, self.save_every)
        return {progress.skipped_step - 1} | back  # the loss of a step belongs to the weights before it


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers in `tensors`, on one device, are finite; synchronises once."""
    if torch.stack(torch._foreach_norm(list(tensors))).isfinite().all():
        return True
    return all(tensor.isfinite().all() for tensor in tensors)  # the norm of large numbers overflows
