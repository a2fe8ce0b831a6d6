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
    checkpoint_name,
    load_model_weights,
    load_trainer_state,
    remove_old_checkpoints,
    unique_tensors,
    write_checkpoint,
)
from minitransformer.training.divergence import NonFiniteTraining, are_finite, remedy, sound_checkpoint
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
from minitransformer.training.step import StepResult, Validation, training_step
from minitransformer.training.validation import Validator

# float16 needs some steps to find its loss scale; nothing that recovers needs more.
MOST_STEPS_WITHOUT_UPDATE = 20
SAMPLES = "samples.txt"


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


def sample_heading(step: int) -> str:
    """The line above the sample of `step` in `samples.txt`."""
    return f"--- step {step}\n"


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
        self.optimizers = build_optimizers(config.optimizer, self.model, config.rates)
        self.balance = ExpertBalance(self.model, config.expert_balance)
        self.precision = Precision.named(machine.precision)(machine.device)
        self.probe = make_probe(self.model, self.objective, machine.device)
        self.progress = Progress()
        self.validator = Validator(self.model, self.objective, self.precision, log)
        self.validation: Validation | None = None
        self._saved: Progress | None = None
        self._steps_without_update = 0
        self._peak_flops = peak_flops(machine.device, self.precision.dtype)
        self._flops_per_token = self.model.flops_per_token(run.config.sequence_length)

    def _pass_a_batch(self) -> None:
        self.objective.loss_sum(self.model, self.objective.training_batches(0)[0].to(self.machine.device))

    def restore(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`; settings that were changed since keep their new values."""
        load_model_weights(checkpoint, self.model)
        state = load_trainer_state(checkpoint)
        # It may be an older one; a stop before the next one is saved must not let the run go on from another.
        files.point_to(self.run.checkpoints / "latest", checkpoint.name)
        if not state:
            return  # the weights that a run begins with, of which nothing is trained yet
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, new in zip(optimizer.param_groups, settings, strict=True):
                group.update(new)
        self.precision.load_state_dict(state["precision"])
        self.progress = Progress(**state["progress"])
        self._saved = replace(self.progress)
        # A kill may have come between a checkpoint and the link to it.
        best = self.run.checkpoints / checkpoint_name(self.progress.best_step)
        if self.progress.best_step and best.exists():
            files.point_to(self.run.checkpoints / "best", best.name)

    def train(self, until: int | None = None) -> None:
        """Step until the last one, an early stop, or a request to stop; the state at the end is always saved.

        With `until`, the pause after that step is such a stop, planned: the schedule is that of all steps.
        Raises `NonFiniteTraining` where training diverges; nothing that is not finite is saved.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        self.model.train()
        if self._validation_due() and self.progress.validated_step != self.progress.step:
            self.log.forget_validation(self.progress.step)
            self._validate()  # the stop that this run continues from came in the middle of it
            self._save_if_due()
        interval = _Interval(self.progress)
        while self.progress.step < last and self.stop.signal is None and not self.stopped_early:
            start = time.perf_counter()
            interval.add(self._step())
            if self._reading_due():
                self._read(interval)
            self.progress.seconds += time.perf_counter() - start
            self.log.advance(self.progress.step)
            if self._due(self.config.log_every):
                self._log(interval)
                interval = _Interval(self.progress)
            self._end_if_diverged()
            if self._validation_due():
                self._validate()
            self._save_if_due()
        self._read(interval)
        self._save()

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` ran out."""
        return self._out_of_patience(self.progress.validations_since_best)

    def _out_of_patience(self, validations: int) -> bool:
        return self.config.patience is not None and validations >= self.config.patience

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _validation_due(self) -> bool:
        return self.objective.validates and self.progress.step > 0 and self._due(self.config.eval_every)

    def _reading_due(self) -> bool:
        """Whether to wait for the device, which may be some steps behind."""
        config = self.config
        return any(map(self._due, (config.log_every, config.eval_every, config.save_every, MOST_STEPS_WITHOUT_UPDATE)))

    def _read(self, interval: _Interval) -> None:
        """Wait for the device, and note which steps were skipped."""
        losses = interval.read()
        for step, loss in enumerate(losses, start=self.progress.step - len(losses) + 1):
            if loss is None:
                self._steps_without_update += 1
                self.progress.skipped_step = self.progress.skipped_step or step
            else:
                self._steps_without_update = 0
                self.progress.first_loss = loss if self.progress.first_loss == math.inf else self.progress.first_loss

    def _end_if_diverged(self) -> None:
        if self._steps_without_update:
            self._check_weights()
        if self._steps_without_update >= MOST_STEPS_WITHOUT_UPDATE:
            raise self._diverged(
                f"{self._steps_without_update} steps in a row had an infinite or NaN loss or gradient, the last one "
                f"step {self.progress.step}; none changed the weights"
            )

    def _check_weights(self) -> None:
        """Raises `NonFiniteTraining` if a weight is not finite, or a tensor that the optimizers keep of one."""
        kept = list(unique_tensors(self.model).values())
        for optimizer in self.optimizers:
            kept += [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
        if not are_finite([tensor for tensor in kept if tensor.is_floating_point()]):
            raise self._diverged(
                f"after step {self.progress.step} there are infinite or NaN numbers in the weights, or in what the "
                "optimizer keeps of them; these are not saved"
            )

    def _diverged(self, what: str) -> NonFiniteTraining:
        sound = sound_checkpoint(self.run, self.objective, self.precision, self.progress.first_loss)
        return NonFiniteTraining(f"{what}; {remedy(self.run, sound, self.machine.precision)}")

    def _step(self) -> StepResult:
        step = self.progress.step
        self.probe.before_step(step + 1)
        torch.manual_seed(step_seed(self.config.seed, step))
        batches = self.training_batches(step)
        set_learning_rate(self.optimizers, self.config.learning_rate_multiplier(step))
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
                "seconds_left": (self.config.steps - self.progress.step) * seconds / steps
                + self.validator.seconds_left(self.progress.step, self.run.config, tokens_per_second),
            }
        )

    def _validate(self) -> None:
        validation = None
        with self.stop.interruptible():
            validation = self._validated()
        if validation is not None:
            self._note(validation)

    def _validated(self) -> Validation:
        """Over the whole split if no other validation comes after this one."""
        if self.progress.step == self.config.steps:
            return self.validator(whole=True)
        validation = self.validator(whole=False)
        worse = not validation.loss < self.progress.best_loss
        if worse and self.validator.subset and self._out_of_patience(self.progress.validations_since_best + 1):
            return self.validator(whole=True)
        return validation

    def _note(self, validation: Validation) -> None:
        self.validation = validation
        self.progress.validated_step = self.progress.step
        loss = validation.comparable_loss
        better = loss < self.progress.best_loss
        if better:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
            if loss < self.progress.first_loss:
                self.progress.skipped_step = 0
        self.progress.validations_since_best = 0 if better else self.progress.validations_since_best + 1
        self.log.record(
            {
                "step": self.progress.step,
                "validation_loss": validation.loss,
                "perplexity": validation.perplexity,
                "bits_per_byte": validation.bits_per_byte,
                "accuracy": validation.accuracy,
                "exact": validation.exact,
                "validation_tokens": validation.tokens,
            }
        )
        self.log.line(f"step {self.progress.step} validation: {validation}")
        if self.config.sample_at_eval:
            self.write_sample()

    def write_sample(self, *, best: bool = False) -> str:
        """A sample of the model as it stands, or of its best weights, also kept in `samples.txt`."""
        model, note = self.model, ""
        if best and self.progress.best_step not in (0, self.progress.step):
            name = checkpoint_name(self.progress.best_step)
            model = self.run.load_model(name, str(self.machine.device))
            note = f"of the best weights, those of step {self.progress.best_step}:\n"
        sample = note + self.sample(model, self.objective)
        with (self.run.path / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(f"{sample_heading(self.progress.step)}{sample}\n")
        self.log.line(sample)
        return sample

    def _save_if_due(self) -> None:
        if self._due(self.config.save_every) or self.progress.best_step == self.progress.step:
            self._save()

    def _save(self) -> None:
        if self._saved == self.progress:
            return
        self._check_weights()
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "precision": self.precision.state_dict(),
            "progress": asdict(self.progress),
        }
        folder = self.run.checkpoints
        self.log.sync()  # first, so that no checkpoint stands for more than the records show
        path = write_checkpoint(folder, self.progress.step, self.model, state, self.run.config)
        # Without validation nobody knows a better one than the last.
        if self.progress.best_step == self.progress.step or not self.objective.validates:
            files.point_to(folder / "best", path.name)
        # The weights of a checkpoint made the loss of the step after it.
        remove_old_checkpoints(folder, self.config.keep_last, also_before=self.progress.skipped_step - 1)
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

    def read(self) -> list[float | None]:
        """Wait for the device; the loss of each step since the last reading, None if that was skipped."""
        figures = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        self.losses += [loss for loss, _, finite in figures if finite]
        self.grad_norms += [norm for _, norm, finite in figures if finite]
        return [loss if finite else None for loss, _, finite in figures]

    @staticmethod
    def mean(values: list[float]) -> float | None:
        """Their mean; None for no values, which JSON can say and NaN it cannot."""
        return sum(values) / len(values) if values else None
