"""When training diverges: how that is noticed, and which checkpoint it can go on from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minitransformer.models.model import build_model
from minitransformer.runs import Run
from minitransformer.training.checkpoint import checkpoint_step, checkpoints_in, damage, load_model_weights
from minitransformer.training.config import TrainingConfig
from minitransformer.training.loader import Loader
from minitransformer.training.precision import Precision

NOISE = 1.02
"""by which the losses of two batches, or of two draws of dropout, may differ"""


class NonFiniteTraining(Exception):
    """The loss or its gradient was infinite or NaN for many steps in a row, or an update made the weights so."""


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number in `tensors`, which are on one device, is infinite or NaN; waits for the device once."""
    if torch.stack(torch._foreach_norm(list(tensors))).isfinite().all():
        return True
    return all(tensor.isfinite().all() for tensor in tensors)  # the norm of large numbers overflows


def sound_checkpoint(run: Run, loader: Loader, precision: Precision, first_loss: float) -> Path | None:
    """The newest whole checkpoint of `run` that training can go on from; None if there is none.

    Its next step has a finite gradient and a loss no larger than `first_loss` nats a target, what the run began with.
    """
    model = build_model(run.config.model).to(precision.device)
    for path in reversed(checkpoints_in(run.checkpoints)):
        if damage(path) is not None:
            continue
        load_model_weights(path, model)
        if _next_loss(model, loader, precision, checkpoint_step(path)) <= NOISE * first_loss:
            return path
    return None


def _next_loss(model: nn.Module, loader: Loader, precision: Precision, step: int) -> float:
    """The mean loss of the step after `step`; NaN if its gradient is not finite."""
    batches = [batch.to(precision.device) for batch in loader.training_batches(step)]
    targets, total = sum(batch.num_targets for batch in batches), 0.0
    model.zero_grad(set_to_none=True)
    for batch in batches:
        with precision.autocast():
            loss = loader.objective.loss_sum(model, batch) / targets
        loss.backward()
        total += loss.item()
    finite = are_finite([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return total if finite else float("nan")


def remedy(run: Run, sound: Path | None, precision: str) -> str:
    """What to do after training diverged, with the checkpoint to go on from, if there is a sound one."""
    rates = " ".join(f"--{name.replace('_', '-')} {rate:g}" for name, rate in _lower_rates(run.config.training).items())
    other = "" if precision == "fp32" else ", or in another --precision, such as fp32"
    if sound is None:
        return f"no checkpoint is sound: begin anew with lower rates, such as {rates}{other}"
    path = shlex.quote(str(run.path))
    return f"go on from before it: python train.py --resume {path} --checkpoint {sound.name} {rates}{other}"


def _lower_rates(training: TrainingConfig) -> dict[str, float]:
    """A tenth of the learning rates that were given, and at most the default one."""
    given = {name: getattr(training, name) for name in ("lr", "embedding_lr", "head_lr")}
    rates = {name: min(rate / 10, TrainingConfig.lr) for name, rate in given.items() if rate is not None}
    return {**rates, "min_lr": 0.0} if training.min_lr > rates["lr"] else rates
