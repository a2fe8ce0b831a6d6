"""Recovering from divergence: a checkpoint from before it, and what the user can do."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minitransformer import files
from minitransformer.models.model import Model, build_model
from minitransformer.training.black_box import leave_black_box
from minitransformer.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_step,
    checkpoints_in,
    damage,
    load_trainer_state,
)
from minitransformer.training.config import TrainingConfig
from minitransformer.training.divergence import Divergence, NonFiniteTraining, are_finite
from minitransformer.training.learner import Learner
from minitransformer.training.progress import Progress
from minitransformer.training.weights import load_model_weights

NOISE = 1.02
"""tolerance for losses on different batches or dropout masks"""


def sound_checkpoint(
    checkpoints: Iterable[Path], learner: Learner, most: float, batch: int | None = None
) -> Path | None:
    """The first of `checkpoints` that training can continue from; None if there is none.

    Its next step has a finite gradient and a loss of about `most` nats per target, or less. That step has the data of
    step `batch`, counted from 0; by default the data that it has had.
    """
    model = build_model(learner.config.model).to(learner.machine.device)
    for path in checkpoints:
        if damage(path) is not None:
            continue
        load_model_weights(path, model)
        step = checkpoint_step(path)
        data = step + load_trainer_state(path).get("skipped_batches", 0) if batch is None else batch
        if _next_loss(model, learner, step, data) <= NOISE * most:
            return path
    return None


def _next_loss(model: Model, learner: Learner, step: int, batch: int) -> float:
    """The mean loss of `model` in the step after `step`; NaN if its gradient is not finite."""
    device = learner.machine.device
    batches = [each.to(device) for each in learner.loader.training_batches(batch)]
    targets, total = sum(each.num_targets for each in batches), 0.0
    model.zero_grad(set_to_none=True)
    model.begin_step(step)
    for each in batches:
        with learner.precision.autocast():
            loss = learner.objective.loss_sum(model, each) / targets
        loss.backward()
        total += loss.item()
    finite = are_finite([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return total if finite else float("nan")


@dataclass(frozen=True)
class RollbackPlan:
    """Training goes on from `checkpoint`, with the data of step `batch`, counted from 0 and without any skips."""

    checkpoint: Path
    batch: int


def plan_rollback(checkpoints: Path, learner: Learner, progress: Progress) -> RollbackPlan | None:
    """The rollback that follows a divergence; None without one, after too many, or without a sound checkpoint.

    It skips the data of all steps up to the end of the divergence, and goes back to the last sound checkpoint that is
    `margin` steps older than its start, or else to the last one before it. Checkpoints of interruptions do not count,
    so that a run goes back to the same step whether it was interrupted or not.
    """
    training = learner.config.training
    policy = training.on_spike.make()
    if progress.rollbacks >= policy.limit:
        return None
    start, end = progress.bad_since or progress.step, progress.diverged_step or progress.step
    # Initial weights have no trainer state to go back to.
    found = [path for path in checkpoints_in(checkpoints) if 0 < checkpoint_step(path) < start]
    regular = [path for path in reversed(found) if checkpoint_step(path) % training.save_every == 0]
    order = sorted(regular, key=lambda path: checkpoint_step(path) >= start - policy.margin)
    batch = end + learner.skipped_batches
    sound = sound_checkpoint(order, learner, progress.first_loss, batch)
    return None if sound is None else RollbackPlan(sound, batch)


def remove_later_checkpoints(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints after `step`, the best one too."""
    for path in checkpoints_in(checkpoints):
        if checkpoint_step(path) > step:
            files.remove(path)
    if not (checkpoints / "best").exists():
        (checkpoints / "best").unlink(missing_ok=True)


def end_of_training(divergence: Divergence, folder: Path, learner: Learner, progress: Progress) -> NonFiniteTraining:
    """The end of the run in `folder`, with a remedy; it leaves a black box unless only the loss is too high."""
    training, precision = learner.config.training, learner.machine.precision
    reasons = [str(divergence)]
    if limit := training.on_spike.make().limit:
        often = progress.rollbacks >= limit
        reasons.append(
            f"there were {limit} rollbacks" if often else "no checkpoint from before can go on with other data"
        )
    found = reversed(checkpoints_in(folder / CHECKPOINTS))
    sound = learner.ranks.from_main(lambda: sound_checkpoint(found, learner, progress.first_loss))
    if not divergence.is_finite:
        reasons.append(leave_black_box(folder, learner, divergence.skipped))
    reasons.append(remedy(folder, training, sound, precision))
    return NonFiniteTraining("; ".join(reasons))


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
