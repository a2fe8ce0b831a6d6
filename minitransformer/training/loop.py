"""The training loop: step, log, validate, save, until the last step or a request to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitransformer import files
from minitransformer.models.model import Model, build_model
from minitransformer.runs import Run
from minitransformer.training.checkpoint import (
    load_model_weights,
    load_trainer_state,
    remove_old_checkpoints,
    write_checkpoint,
)
from minitransformer.training.experts import ExpertBalance
from minitransformer.training.logging import Log
from minitransformer.training.machine import Machine, compiled, keep_freed_memory, peak_flops
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.optimizers import build_optimizers, set_learning_rate
from minitransformer.training.precision import Precision
from minitransformer.training.prefetch import prefetched
from minitransformer.training.probe import NO_PROBE, Probe
from minitransformer.training.signals import StopRequest
from minitransformer.training.step import StepResult, Validation, training_step, validate

# float16 needs some steps to find its loss scale; nothing that recovers needs more.
MOST_STEPS_WITHOUT_UPDATE = 20


class NonFiniteTraining(Exception):
    """The loss or its gradient was infinite or NaN for many steps in a row; none of them changed the weights."""


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


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in `step`: with it, no generator's state has to survive an interruption."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


class Trainer:
    """Trains the model of `run`, and writes down what happens in its folder.

    The state after a step is a function of the configuration and the data alone, on a CPU bit for bit: a run that is
    interrupted anywhere and restored from a checkpoint ends as if it had not been.
    """

    def __init__(
        self,
        run: Run,
        prepared: Prepared,
        machine: Machine,
        log: Log,
        stop: StopRequest,
        sample: Callable[[Model, Objective], str],
        make_probe: Callable[[Model, Objective, torch.device], Probe] = lambda *_: NO_PROBE,
    ) -> None:
        self.run, self.machine, self.log, self.stop, self.sample = run, machine, log, stop, sample
        config = self.config = run.config.training
        keep_freed_memory()
        self.objective = Objective.named(config.objective)(prepared, run.config)
        self.training_batches = prefetched(self.objective.training_batches, machine.device)
        torch.manual_seed(config.seed)
        self.model = build_model(run.config.model).to(machine.device)
        self.model.calibrate(self._pass_a_batch)
        self.fast_model = compiled(self.model) if machine.compile else self.model
        self.optimizers = build_optimizers(config.optimizer, self.model, config.optimizer_settings)
        self.balance = ExpertBalance(self.model, config.expert_balance)
        self.precision = Precision.named(machine.precision)(machine.device)
        self.probe = make_probe(self.model, self.objective, machine.device)
        self.progress = Progress()
        self.validation: Validation | None = None
        self._saved: Progress | None = None
        self._steps_without_update = 0
        self._peak_flops = peak_flops(machine.device, self.precision.dtype)
        self._flops_per_token = self.model.flops_per_token(run.config.model.context_length)

    def _pass_a_batch(self) -> None:
        self.objective.loss_sum(self.model, self.objective.training_batches(0)[0].to(self.machine.device))

    def restore(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`; settings that were changed since keep their new values."""
        load_model_weights(checkpoint, self.model)
        state = load_trainer_state(checkpoint)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, new in zip(optimizer.param_groups, settings, strict=True):
                group.update(new)
        self.precision.load_state_dict(state["precision"])
        self.progress = Progress(**state["progress"])
        self._saved = replace(self.progress)

    def train(self, until: int | None = None) -> None:
        """Step until the last one, an early stop, or a request to stop; the state at the end is always saved.

        With `until`, the pause after that step is such a stop, planned: the schedule is that of all steps.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        self.model.train()
        if self._validation_due() and self.progress.validated_step != self.progress.step:
            self._validate()  # the stop that this run continues from came in the middle of it
        interval = _Interval(self.progress)
        while self.progress.step < last and self.stop.signal is None and not self.stopped_early:
            start = time.perf_counter()
            interval.add(self._step())
            if self._reading_due():
                for finite in interval.read():
                    self._steps_without_update = 0 if finite else self._steps_without_update + 1
            self.progress.seconds += time.perf_counter() - start
            self.log.advance(self.progress.step)
            if self._due(self.config.log_every):
                self._log(interval)
                interval = _Interval(self.progress)
            if self._validation_due():
                self._validate()
            if self._due(self.config.save_every) or self.progress.best_step == self.progress.step:
                self._save()
            if self._steps_without_update >= MOST_STEPS_WITHOUT_UPDATE:
                self._save()
                raise NonFiniteTraining(
                    f"{self._steps_without_update} steps in a row had an infinite or NaN loss or gradient, the last "
                    f"one step {self.progress.step}; none changed the weights, which are saved: try a lower --lr, or "
                    "--precision fp32"
                )
        self._save()

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` ran out."""
        return self.config.patience is not None and self.progress.validations_since_best >= self.config.patience

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _validation_due(self) -> bool:
        return self.objective.validates and self.progress.step > 0 and self._due(self.config.eval_every)

    def _reading_due(self) -> bool:
        """Whether to wait for the device, which may be some steps behind."""
        config = self.config
        return any(map(self._due, (config.log_every, config.eval_every, config.save_every, MOST_STEPS_WITHOUT_UPDATE)))

    def _step(self) -> StepResult:
        step = self.progress.step
        self.probe.before_step(step + 1)
        torch.manual_seed(step_seed(self.config.seed, step))
        batches = self.training_batches(step)
        set_learning_rate(self.optimizers, self.config.learning_rate_share(step))
        result = training_step(
            self.fast_model,
            self.objective,
            batches,
            self.optimizers,
            self.precision,
            grad_clip=self.config.grad_clip,
            balance=self.balance,
            probe=self.probe,
        )
        self.progress.step += 1
        self.progress.tokens += sum(batch.num_tokens for batch in batches)
        if figures := self.probe.after_update(result.grad_norm):
            self.log.record({"step": self.progress.step, **figures})
        return result

    def _log(self, interval: _Interval) -> None:
        steps = self.progress.step - interval.first_step
        seconds = self.progress.seconds - interval.first_second
        tokens_per_second = (self.progress.tokens - interval.first_token) / seconds
        self.log.record(
            {
                "step": self.progress.step,
                "loss": interval.mean(interval.losses),
                "grad_norm": interval.mean(interval.grad_norms),
                "skipped_steps": steps - len(interval.losses),
                "lr": self.optimizers[0].param_groups[0]["lr"],
                "tokens": self.progress.tokens,
                "tokens_per_second": tokens_per_second,
                "mfu": tokens_per_second * self._flops_per_token / self._peak_flops,
                "seconds": self.progress.seconds,
                "seconds_left": (self.config.steps - self.progress.step) * seconds / steps,
            }
        )

    def _validate(self) -> None:
        validation = None
        with self.stop.interruptible():
            validation = validate(self.model, self.objective, self.precision)
        if validation is not None:
            self._note(validation)

    def _note(self, validation: Validation) -> None:
        self.validation = validation
        self.progress.validated_step = self.progress.step
        better = validation.loss < self.progress.best_loss
        if better:
            self.progress.best_loss, self.progress.best_step = validation.loss, self.progress.step
        self.progress.validations_since_best = 0 if better else self.progress.validations_since_best + 1
        self.log.record(
            {
                "step": self.progress.step,
                "validation_loss": validation.loss,
                "perplexity": validation.perplexity,
                "bits_per_byte": validation.bits_per_byte,
                "accuracy": validation.accuracy,
                "exact": validation.exact,
            }
        )
        self.log.line(f"step {self.progress.step} validation: {validation}")
        if self.config.sample_at_eval:
            self.write_sample()

    def write_sample(self) -> str:
        """A sample of the model as it stands, also kept in `samples.txt`."""
        sample = self.sample(self.model, self.objective)
        with (self.run.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {self.progress.step}\n{sample}\n")
        self.log.line(sample)
        return sample

    def _save(self) -> None:
        if self._saved == self.progress:
            return
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "precision": self.precision.state_dict(),
            "progress": asdict(self.progress),
        }
        folder = self.run.checkpoints
        path = write_checkpoint(folder, self.progress.step, self.model, state)
        # Without validation nobody knows a better one than the last.
        if self.progress.best_step == self.progress.step or not self.objective.validates:
            files.point_to(folder / "best", path.name)
        remove_old_checkpoints(folder, self.config.keep_last)
        self._saved = replace(self.progress)


class _Interval:
    """What happened since the last record; what steps found out stays on the device until it is read."""

    def __init__(self, start: Progress) -> None:
        self.first_step, self.first_token, self.first_second = start.step, start.tokens, start.seconds
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._unread: list[Tensor] = []

    def add(self, result: StepResult) -> None:
        self._unread.append(torch.stack([result.loss, result.grad_norm, result.finite.to(result.loss.dtype)]))

    def read(self) -> list[bool]:
        """Wait for the device; whether each step since the last reading was finite."""
        figures = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        self.losses += [loss for loss, _, finite in figures if finite]
        self.grad_norms += [norm for _, norm, finite in figures if finite]
        return [bool(finite) for _, _, finite in figures]

    @staticmethod
    def mean(values: list[float]) -> float | None:
        """Their mean; None for no values, which JSON can say and NaN it cannot."""
        return sum(values) / len(values) if values else None
