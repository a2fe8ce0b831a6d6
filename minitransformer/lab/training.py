"""Training inside an experiment, from a configuration to training curves, without a run folder.

It uses the same `Learner` as the `Trainer`, and gives the same weights bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minitransformer.architecture.residual import Residual
from minitransformer.diagnostics import probe_for
from minitransformer.lab.experiment import Experiment, curve
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model
from minitransformer.reporting.figures import Curve
from minitransformer.settings import kinds, with_settings
from minitransformer.tasks.task import Measurement, Result, Task
from minitransformer.text.batches import SequentialWindows
from minitransformer.text.datasets import PreparedData
from minitransformer.training.config import RunConfig, TrainingConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.learner import Learner, build_learner
from minitransformer.training.machine import Machine
from minitransformer.training.optimizers import AdamW
from minitransformer.training.validation import validate

BASE = RunConfig(
    ModelConfig(
        d_model=64,
        num_layers=6,
        num_heads=4,
        context_length=64,
        residual="post",
        positions="learned",
        feedforward="relu",
        bias=True,
        scaled_embeddings=True,
        tied_embeddings=False,
        init="xavier",
    ),
    DataConfig(tokenizer="chars"),
    TrainingConfig(
        steps=400,
        batch_size=8,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        optimizer=AdamW.choose(beta2=0.98, eps=1e-9),
        grad_clip=0.0,
        precision="fp32",
        probe=("gradient-norm", "update-ratio", "stream-variance", "representation-change"),
    ),
)
"""The decoder that training experiments share: a small one with the choices and the Adam of Vaswani et al. 2017 (arXiv
1706.03762), but for learned positions and a head of its own. Its embeddings are N(0, 1), as experiments at
initialisation have them."""
CPU = Machine(torch.device("cpu"), "fp32", compile=False, description="")
"""the machine of every experiment, for reproducible numbers"""
STUCK = 3.2
"""nats a character: who knows no more of Tiny Shakespeare than how frequent each character is has 3.3"""
LAST = 25
"""number of last steps whose mean loss is reported"""


@dataclass(frozen=True)
class TrainingCurve:
    """A training curve: the mean loss in nats per target, and the gradient norm before clipping, of each step."""

    losses: list[float]
    grad_norms: list[float]

    @property
    def finite(self) -> bool:
        """Whether no step had an infinite or NaN loss or gradient."""
        return all(map(math.isfinite, (*self.losses, *self.grad_norms)))

    @property
    def last_loss(self) -> float:
        """The mean loss of the last steps; infinite if training diverged."""
        return final_loss(self.losses) if self.finite else math.inf


@dataclass(frozen=True)
class Trained:
    """A trained model with its data, training curve and diagnostics."""

    learner: Learner
    training_curve: TrainingCurve
    probed: list[dict[str, float | None]]

    @property
    def model(self) -> Model:
        """The model with its current weights."""
        return self.learner.model

    def validation_loss(self) -> float:
        """Nats per target over the whole validation split; infinite if training diverged."""
        if not self.training_curve.finite:
            return math.inf
        return validate(self.model, self.learner.loader, self.learner.precision).loss

    def held_out(self, rows: int) -> Callable[[], Tensor]:
        """The mean loss of one batch, the first `rows` windows of the validation split, for diagnostics."""
        model, objective, data = self.model, self.learner.objective, self.learner.loader.data
        batch = SequentialWindows(data.targets("validation"), model.config.context_length, rows).batch(0)
        return lambda: objective.loss_sum(model, batch) / batch.num_targets


def final_loss(losses: Sequence[float]) -> float:
    """The mean of the last `losses`; infinite if one is not finite, or there are none."""
    last = losses[-LAST:]
    return sum(last) / len(last) if last and all(map(math.isfinite, last)) else math.inf


def train(
    config: RunConfig,
    prepared: PreparedData,
    stop: Callable[[TrainingCurve], bool] = lambda training_curve: False,
) -> Trained:
    """Train the model of `config` in float32 on the CPU, exactly as the `Trainer` would.

    Training ends at the first non-finite loss or gradient, or if `stop`, called after each step, returns True.
    """
    learner = build_learner(config, prepared, CPU, make_probe=probe_for(config.training))
    training_curve, probed = TrainingCurve([], []), []
    for step in range(1, config.training.steps + 1):
        result = learner.step(learner.next_batches())
        if result.measured:
            probed.append({"step": step, **result.measured})
        training_curve.losses.append(result.loss.item())
        training_curve.grad_norms.append(result.grad_norm.item())
        if not result.finite or stop(training_curve):
            break
    return Trained(learner, training_curve, probed)


class TrainingExperiment(Experiment):
    """An experiment whose tasks are training runs, with the settings of the task and of BASE."""

    @cached_property
    def text(self) -> PreparedData:
        """The tokenized text, prepared once for all experiments and processes."""
        return replace(BASE, data=self._data).prepare()

    def prepare(self) -> None:
        _ = self.text

    @property
    def _data(self) -> DataConfig:
        return replace(BASE.data, data=self.settings.data)

    def configured(self, task: Task) -> RunConfig:
        """The configuration of `task`, with the model settings that its placement asks for by default."""
        choices = {**Residual.named(task["residual"]).asks_for, "probe_every": task["steps"], **task}
        known = kinds(RunConfig)
        choices = {name: value for name, value in choices.items() if name in known}
        base = replace(BASE, data=self._data)
        return with_settings(base, {"vocab_size": self.text.tokenizer.vocab_size, **choices})

    def train(self, task: Task, stop: Callable[[TrainingCurve], bool] = lambda training_curve: False) -> Trained:
        """Train the model of `task`."""
        return train(self.configured(task), self.text, stop)

    def record(self, trained: Trained) -> Measurement:
        """The record of a training run: training curve, diagnostics of its layers, and configuration."""
        config = trained.learner.config.to_json()
        return {
            "losses": [round(loss, 4) for loss in trained.training_curve.losses],
            "grad_norms": [float(f"{norm:.4g}") for norm in trained.training_curve.grad_norms],
            "finite": trained.training_curve.finite,
            "last_loss": trained.training_curve.last_loss,
            "probed": trained.probed,
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        }


def loss_curve(label: str, rows: Sequence[Sequence[float]]) -> Curve:
    """The mean loss over seeds (rows), in blocks of LAST steps, with its interval, up to the shortest row."""
    steps = min(map(len, rows)) // LAST * LAST
    blocks = np.asarray([row[:steps] for row in rows], dtype=float).reshape(len(rows), -1, LAST).mean(-1)
    return curve(label, [LAST * (i + 1) for i in range(blocks.shape[1])], blocks)


def per_seed(results: Sequence[Result], names: Sequence[str], value: Callable[..., float]) -> list[float]:
    """`value` of the measurements of the placements `names`, for each common seed."""
    runs = {name: {run.task["seed"]: run.measured for run in results if run.task["residual"] == name} for name in names}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
    return [value(*(runs[name][seed] for name in names)) for seed in shared]
