"""The learner: everything that a training step needs, for every run, experiment, trial and benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitransformer.models.model import Model, build_model
from minitransformer.text.batches import TrainingBatch
from minitransformer.text.datasets import PreparedData
from minitransformer.training.checkpoint import load_model_weights
from minitransformer.training.config import RunConfig
from minitransformer.training.experts import ExpertBalance
from minitransformer.training.loader import Loader
from minitransformer.training.machine import Machine, compiled, keep_freed_memory
from minitransformer.training.memory import MicroBatches
from minitransformer.training.optimizers import build_optimizers, set_learning_rate
from minitransformer.training.precision import Precision
from minitransformer.training.prefetch import prefetched
from minitransformer.training.probe import NO_PROBE, Probe
from minitransformer.training.step import StepResult, training_step

MakeProbe = Callable[[Model, Loader, torch.device], Probe]


def build_learner(
    config: RunConfig,
    data: PreparedData,
    machine: Machine,
    *,
    initial: Path | None = None,
    make_probe: MakeProbe = lambda *_: NO_PROBE,
) -> Learner:
    """The learner of `config`, with known vocabulary, before its first step.

    Weights are initialised by the run's seed and calibrated on its first batch, or loaded from `initial`.
    """
    keep_freed_memory()
    loader = Loader.of_run(config, data)
    torch.manual_seed(config.training.seed)
    model = build_model(config.model).to(machine.device).train()
    if initial is None:
        model.calibrate(lambda: loader.objective.loss_sum(model, loader.training_batches(0)[0].to(machine.device)))
    else:
        load_model_weights(initial, model)
    return Learner(config, model, loader, machine, make_probe(model, loader, machine.device))


class Learner:
    """A model with its batches, objective, optimizers and precision.

    The state after a step depends on the configuration and the data alone, bit for bit on a CPU.
    """

    def __init__(
        self, config: RunConfig, model: Model, loader: Loader, machine: Machine, probe: Probe = NO_PROBE
    ) -> None:
        training = config.training
        self.config, self.model, self.machine, self.probe = config, model, machine, probe
        self.loader, self.objective = loader, loader.objective
        self.fast_model = compiled(model) if machine.compile else model
        self.optimizers = build_optimizers(training.optimizer, model, training.rates)
        self.balance = ExpertBalance(model, training.expert_balance)
        self.precision = Precision.named(machine.precision)(machine.device)
        self.micro_batches = MicroBatches(training.batch_size, may_halve=training.on_oom == "halve")
        self.steps_done, self.skipped_batches = 0, 0
        self._batches = prefetched(loader.training_batches, machine.device)

    def next_batches(self) -> Sequence[TrainingBatch]:
        """The micro-batches of the next step, whose data comes after what rollbacks have skipped."""
        return self._batches(self.steps_done + self.skipped_batches)

    def step(self, batches: Sequence[TrainingBatch]) -> StepResult:
        """One optimizer step on the mean loss over all targets of `batches`."""
        step, training = self.steps_done, self.config.training
        self.probe.before_step(step + 1)
        set_learning_rate(self.optimizers, training.learning_rate_multiplier(step))
        self.model.begin_step(step)
        result = training_step(
            self.fast_model,
            self.objective,
            batches,
            self.optimizers,
            self.precision,
            grad_clip=training.grad_clip,
            balance=self.balance,
            memory=self.micro_batches,
            seed=step_seed(training.seed, step),
            probe=self.probe,
        )
        self.model.end_step()
        self.steps_done += 1
        return replace(result, measured=self.probe.after_update(result.grad_norm))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group in the last step."""
        return self.optimizers[0].param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """All state that the next step depends on, except the weights, which checkpoints store separately."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "precision": self.precision.state_dict(),
            "step": self.steps_done,
            "skipped_batches": self.skipped_batches,
            "micro_batches": self.micro_batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; changed optimizer settings keep their new values."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, new in zip(optimizer.param_groups, settings, strict=True):
                group.update(new)
        self.precision.load_state_dict(state["precision"])
        self.steps_done = state["step"]
        # Older checkpoints have neither.
        self.skipped_batches = state.get("skipped_batches", 0)
        if "micro_batches" in state:
            self.micro_batches.load_state_dict(state["micro_batches"])


def step_seed(seed: int, step: int) -> int:
    """The random seed of `step`, so that no generator's state has to be saved."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])
