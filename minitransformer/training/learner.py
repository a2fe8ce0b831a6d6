"""The learner: everything that a training step needs, for every run, experiment, trial and benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitransformer.architecture.dropout import rows_from
from minitransformer.errors import StorageError, UserError
from minitransformer.models.adapters import freeze_matching
from minitransformer.models.model import Model
from minitransformer.text.batches import TrainingBatch
from minitransformer.text.datasets import PreparedData
from minitransformer.training.activation_checkpointing import checkpoint_activations
from minitransformer.training.config import RunConfig
from minitransformer.training.distillation import Distillation
from minitransformer.training.experts import ExpertBalance
from minitransformer.training.loader import Loader
from minitransformer.training.machine import Machine, compiled, keep_freed_memory
from minitransformer.training.memory import MicroBatches
from minitransformer.training.optimizer_state import load_optimizer_states, optimizer_states
from minitransformer.training.optimizers import build_optimizers, set_learning_rate
from minitransformer.training.parallel import Parallel, parallel_over
from minitransformer.training.precision import Precision
from minitransformer.training.prefetch import prefetched
from minitransformer.training.probe import NO_PROBE, Probe
from minitransformer.training.ranks import ONE_PROCESS, Ranks
from minitransformer.training.sparsity import ZeroWeights
from minitransformer.training.weights import load_model_weights

MakeProbe = Callable[[Model, Loader, torch.device], Probe]


@dataclass(frozen=True)
class StepResult:
    """The mean loss in nats per target, the gradient norm before clipping, and whether both are finite.

    They are those of all ranks together. Reading them synchronises with the device. `measured` are the figures of the
    probe, if any.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    measured: Mapping[str, float | None] = field(default_factory=dict)


def build_learner(
    config: RunConfig,
    data: PreparedData,
    machine: Machine,
    ranks: Ranks = ONE_PROCESS,
    *,
    initial: Path | None = None,
    teacher: Model | None = None,
    make_probe: MakeProbe = lambda *_: NO_PROBE,
) -> Learner:
    """The learner of `config`, with known vocabulary, before its first step.

    Weights are initialised by the run's seed and calibrated on its first batch, or loaded from `initial`. Raises
    `UserError` if there is no `teacher` for a run that has one.
    """
    if config.training.teacher is not None and teacher is None:
        raise UserError("a run with a teacher is trained by train.py alone: leave --teacher out")
    loader = Loader.of_run(config, data)
    parallel = parallel_over(ranks, config.training.parallel)
    parallel.check(config.model, config.training)
    torch.manual_seed(config.training.seed)
    model = parallel.build(config.model, machine.device).train()
    keep_freed_memory()
    if initial is None:
        model.calibrate(lambda: loader.objective.loss_sum(model, loader.training_batches(0)[0].to(machine.device)))
    else:
        load_model_weights(initial, model)
    return Learner(config, model, loader, machine, make_probe(model, loader, machine.device), parallel, teacher)


class Learner:
    """A model with its batches, objective, optimizers and precision, in one process or `parallel` ones.

    The state after a step depends on the configuration and the data alone, bit for bit on a CPU.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        loader: Loader,
        machine: Machine,
        probe: Probe = NO_PROBE,
        parallel: Parallel | None = None,
        teacher: Model | None = None,
    ) -> None:
        training = config.training
        self.config, self.model, self.machine, self.probe = config, model, machine, probe
        self.loader, self.objective = loader, loader.objective
        self.distillation: Distillation | None = None
        if teacher is not None:
            weight, temperature = training.distill_weight, training.distill_temperature
            self.distillation = Distillation(loader.objective, teacher.to(machine.device), weight, temperature)
        freeze_matching(model, training.freeze)
        self.parallel = parallel or Parallel()
        self.ranks = self.parallel.ranks
        self.precision = Precision.named(machine.precision)(machine.device)
        if training.activation_checkpointing:
            checkpoint_activations(model, self.precision, compiled=machine.compile)
        self.fast_model = self.parallel.wrap(compiled(model) if machine.compile else model)
        self.optimizers = build_optimizers(training.optimizer, model, training.rates, self.parallel)
        self.balance = ExpertBalance(model, training.expert_balance, self.ranks)
        self.micro_batches = MicroBatches(training.batch_size, training.on_oom == "halve", self.ranks)
        self.steps_done, self.skipped_batches = 0, 0
        self._batches = prefetched(loader.training_batches, machine.device, self.ranks.share)

    def next_batches(self) -> Sequence[TrainingBatch]:
        """The micro-batches of the next step, with the rows of all ranks; their data comes after skipped data."""
        return self._batches(self.steps_done + self.skipped_batches)

    def step(self, batches: Sequence[TrainingBatch]) -> StepResult:
        """One optimizer step on the mean loss over all targets of `batches`.

        If the loss or a gradient is infinite or NaN, the step is skipped. Raises `OutOfMemory`.
        """
        step, training = self.steps_done, self.config.training
        self.probe.before_step(step + 1)
        set_learning_rate(self.optimizers, training.learning_rate_multiplier(step))
        self.model.begin_step(step)
        loss = self.ranks.sum(self._loss_with_gradients(batches))
        self.precision.unscale(self.optimizers)
        self.probe.before_update()
        grad_norm = self.parallel.clip_grad_norm(self.model.parameters(), training.grad_clip or math.inf)
        finite = torch.isfinite(loss + grad_norm)
        zeros = ZeroWeights(self.model) if training.keep_zeros else None
        self.precision.update(self.optimizers, skip=(~finite).float())
        if zeros is not None:
            zeros.restore()
        self.model.zero_grad(set_to_none=True)
        self.model.end_step()
        self.steps_done += 1
        return StepResult(loss, grad_norm, finite, self.probe.after_update(grad_norm))

    def _loss_with_gradients(self, batches: Sequence[TrainingBatch]) -> Tensor:
        """Add the gradients of `batches`, and return this rank's part of the loss; raises `OutOfMemory`."""
        if not self._must_agree:
            return self.micro_batches.compute(batches, self._add_gradients, self._drop_gradients)
        add = partial(self._add_gradients, synchronised=False)
        loss = self.micro_batches.compute(batches, add, self._drop_gradients)
        # The passes of all ranks fit into their memory: one over a row without targets adds up their gradients.
        with self.parallel.synchronised(self.fast_model, now=True):
            with self.precision.autocast():
                nothing = self._loss_sum(batches[0].rows(0, 0).to(self.machine.device))
            self.precision.backward(nothing)
        return loss

    @property
    def _must_agree(self) -> bool:
        """Whether ranks ask each other, before they add up their gradients, if one has run out of memory."""
        return self.config.training.on_oom == "halve" and self.parallel.is_shared

    def _add_gradients(self, batches: Sequence[TrainingBatch], *, synchronised: bool = True) -> Tensor:
        """Add the gradients of all micro-batches, and return this rank's part of the mean loss over all their targets.

        The sum over each micro-batch is divided by the number of targets in all of them, so that k micro-batches equal
        one batch, on one rank or divided over several; the load-balancing loss of experts is added to the gradients.
        If `synchronised`, the last backward pass adds up the gradients of all ranks.
        """
        counts = [batch.num_targets for batch in batches]  # on the CPU, to avoid synchronising with the device
        targets, row = sum(counts), 0
        total = torch.zeros((), device=self.machine.device)
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True), start=1):
            mine = self.ranks.share(batch.num_rows)
            first = row + mine.start
            self.balance.record(counted=bool(mine))
            rows = batch.rows(mine.start, mine.stop).to(self.machine.device, non_blocking=True)
            torch.manual_seed(self._seed(first))
            now = synchronised and number == len(batches)
            with rows_from(first), self.parallel.synchronised(self.fast_model, now=now):
                with self.precision.autocast():
                    loss = self._loss_sum(rows) / targets
                    total += loss.detach()
                    loss = loss + self.balance.loss() * count / targets
                self.precision.backward(loss * self.parallel.gradients_scale)
            row += batch.num_rows
        return total

    def _loss_sum(self, batch: Any) -> Tensor:
        return (self.distillation or self.objective).loss_sum(self.fast_model, batch)

    def _drop_gradients(self) -> None:
        self.balance.loss()
        self.model.zero_grad(set_to_none=True)

    def _seed(self, first_row: int) -> int:
        """The random seed of rows of this step; on a CPU, dropout depends on the row anyway."""
        by_row = first_row > 0 and self.machine.device.type != "cpu"
        return random_seed(self.config.training.seed, self.steps_done, *([first_row] if by_row else []))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group in the last step."""
        return self.optimizers[0].param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """All state that the next step depends on, except the weights, which checkpoints store separately."""
        return {
            "optimizers": optimizer_states(self.optimizers, self.model),
            "precision": self.precision.state_dict(),
            "step": self.steps_done,
            "skipped_batches": self.skipped_batches,
            "micro_batches": self.micro_batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; changed optimizer settings keep their new values.

        Raises `StorageError` for the state of another learner, or none.
        """
        try:
            load_optimizer_states(self.optimizers, self.model, state["optimizers"])
            self.precision.load_state_dict(state["precision"])
            self.steps_done = state["step"]
            # Older checkpoints have neither.
            self.skipped_batches = state.get("skipped_batches", 0)
            if "micro_batches" in state:
                self.micro_batches.load_state_dict(state["micro_batches"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise StorageError(
                f"the saved state of the optimizers is damaged ({type(error).__name__}: {error}): "
                "choose another checkpoint"
            ) from None


def random_seed(*numbers: int) -> int:
    """A seed from several numbers, so that no generator's state has to be saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
