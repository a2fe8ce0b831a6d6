"""The training loop: step, log, validate and save, until the last step or a request to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from minitransformer import files
from minitransformer.models.model import Model
from minitransformer.training import checkpoint
from minitransformer.training.divergence import Divergence, DivergenceWatch
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from minitransformer.training.logging import Log
from minitransformer.training.progress import Meter, Progress
from minitransformer.training.recovery import end_of_training, plan_rollback, remove_later_checkpoints
from minitransformer.training.saving import Saver
from minitransformer.training.signals import StopRequest
from minitransformer.training.validation import StoppedValidation, Validation, Validator
from minitransformer.training.weights import load_model_weights

SAMPLES = "samples.txt"


class Trainer:
    """Runs `learner`, and writes logs, samples and checkpoints to `folder`.

    A run that is interrupted and restored from a checkpoint ends as if it had not been interrupted.
    """

    def __init__(
        self, folder: Path, learner: Learner, log: Log, stop: StopRequest, sample: Callable[[Model, Loader], str]
    ) -> None:
        self.folder, self.learner, self.log, self.stop, self.sample = folder, learner, log, stop, sample
        self.config, self.ranks = learner.config.training, learner.ranks
        self.progress = Progress()
        self.validator = Validator(learner, log, stop)
        self.validation: Validation | None = None
        self._saver = Saver(self._checkpoints, learner.config, log, learner.parallel)
        self._saved: Progress | None = None

    def train(self, until: int | None = None) -> None:
        """Train until the last step, early stopping, or a request to stop; the final state is always saved.

        `until` stops after that step; the learning-rate schedule is still that of all steps.
        Raises `NonFiniteTraining` if training diverges; non-finite states are not saved.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        self.learner.model.train()
        with self._saver:
            while not self._advance(last):
                pass

    def _advance(self, last: int) -> bool:
        """Train until step `last`, or back from a divergence to an earlier step; whether it was the former."""
        self._meter = Meter(self.learner, self.progress)
        self._divergence = DivergenceWatch(self.learner, self.progress)
        try:
            self._train(last)
        except Divergence as divergence:
            self._recover(divergence)
            return False
        return True

    def _train(self, last: int) -> None:
        self._divergence.check()  # of the last step before an interruption
        self._finish_validation()
        while self.progress.step < last and not self.stopped_early and not self._stop_agreed():
            self._step()
            if self._due(self.config.log_every):
                self._log()
            self._divergence.check()
            if self._validation_due():
                self._validate()
            self._save_if_due()
        self._read()
        self._save()

    def _recover(self, divergence: Divergence) -> None:
        """Go back to a checkpoint from before `divergence`; raises `NonFiniteTraining` if the run is to end."""
        self._saver.wait()
        rollback = self.ranks.from_main(lambda: plan_rollback(self._checkpoints, self.learner, self.progress))
        if rollback is None:
            raise end_of_training(divergence, self.folder, self.learner, self.progress)
        end, rollbacks = self.progress.diverged_step or self.progress.step, self.progress.rollbacks + 1
        self.restore(rollback.checkpoint)
        step, before = self.progress.step, self.learner.skipped_batches
        self.learner.skipped_batches = rollback.batch - step
        self.progress.rollbacks = rollbacks
        self.ranks.from_main(lambda: remove_later_checkpoints(self._checkpoints, step))
        if not (self._checkpoints / checkpoint.checkpoint_name(self.progress.best_step)).exists():
            self.progress.forget_best()
        skipped = self.learner.skipped_batches - before
        self.log.rewind(step, rollbacks)
        self.log.record({"step": step, "rollback": rollbacks, "rolled_back_from": end, "skipped_batches": skipped})
        self.log.line(f"{divergence}: back to step {step}, and the data of {skipped} steps is skipped")
        self._save()

    def _stop_agreed(self) -> bool:
        """Whether the ranks agree to stop: on a request, or to report a checkpoint that could not be written."""
        return self.stop.agreed(self.ranks, failed=self._saver.failed)

    def _step(self) -> None:
        start = time.perf_counter()
        batches = self.learner.next_batches()
        halvings = self.learner.micro_batches.halvings
        result = self.learner.step(batches)
        if self.learner.micro_batches.halvings > halvings:
            self.log.line(f"step {self.learner.steps_done}: {self.learner.micro_batches}")
        self.progress.step = self.learner.steps_done
        self.progress.tokens += sum(batch.num_tokens for batch in batches)
        self._meter.add(result)
        if result.measured:
            self.log.record({"step": self.progress.step, **result.measured})
        if self._reading_due():
            self._read()
        self.progress.seconds += time.perf_counter() - start
        self.log.advance(self.progress.step)

    def _read(self) -> None:
        """Synchronise with the device, and read the losses."""
        self._divergence.note(self._meter.read())

    def _reading_due(self) -> bool:
        """Whether to synchronise with the device, which may be some steps behind, except for a CPU."""
        config = self.config
        often = (config.log_every, config.eval_every, config.save_every, config.max_skipped_steps)
        return self.learner.machine.device.type == "cpu" or any(map(self._due, often))

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.steps

    def _log(self) -> None:
        record = self._meter.record()
        speed = record["tokens_per_second"]
        record["seconds_left"] += self.validator.seconds_left(self.progress.step, self.learner.config, speed)
        self.log.record(record)

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` ran out."""
        return self._out_of_patience(self.progress.validations_since_best)

    def _out_of_patience(self, validations: int) -> bool:
        return self.config.patience is not None and validations >= self.config.patience

    def _validation_due(self) -> bool:
        return self.learner.loader.validates and self.progress.step > 0 and self._due(self.config.eval_every)

    def _finish_validation(self) -> None:
        """Repeat a validation during which the run was stopped."""
        if self._validation_due() and self.progress.validated_step != self.progress.step:
            self.log.forget_validation(self.progress.step)
            self._validate()
            self._save_if_due()

    def _validate(self) -> None:
        try:
            self._note(self._validated())
        except StoppedValidation:
            self.learner.model.train()

    def _validated(self) -> Validation:
        """The metrics; over the whole split in the last validation."""
        if self.progress.step == self.config.steps:
            return self.validator(whole=True)
        validation = self.validator(whole=False)
        worse = not validation.loss < self.progress.best_loss
        if worse and self.validator.subset and self._out_of_patience(self.progress.validations_since_best + 1):
            return self.validator(whole=True)
        return validation

    def _note(self, validation: Validation) -> None:
        self.validation = validation
        self.progress.note(validation.comparable_loss)
        self.log.record({"step": self.progress.step, **validation.record()})
        self.log.line(f"step {self.progress.step} validation: {validation}")
        if self.config.sample_at_eval:
            self.write_sample()

    def write_sample(self, *, best: bool = False) -> str:
        """A sample from the current or the best weights, also written to `samples.txt`; "" except on the main rank."""
        earlier = best and self.progress.best_step not in (0, self.progress.step)
        model = None if earlier else self.learner.parallel.whole(self.learner.model)
        if not self.ranks.is_main:
            return ""
        note = ""
        if model is None:
            model = self._best_model()
            note = f"from the best weights, of step {self.progress.best_step}:\n"
        sample = note + self.sample(model, self.learner.loader)
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(f"{sample_heading(self.progress.step)}{sample}\n")
        self.log.line(sample)
        return sample

    def write_last_sample(self) -> None:
        """A sample from the best weights, unless the last validation has just written one."""
        if not (self.config.sample_at_eval and self.progress.best_step == self.progress.step):
            self.write_sample(best=True)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / checkpoint.CHECKPOINTS

    def _best_model(self) -> Model:
        chosen = checkpoint.choose_checkpoint(self._checkpoints, checkpoint.checkpoint_name(self.progress.best_step))
        return checkpoint.load_model(chosen, self.learner.config, self.learner.machine.device)

    def _save_if_due(self) -> None:
        if self._due(self.config.save_every) or self.progress.best_step == self.progress.step:
            self._save()

    def _save(self) -> None:
        if self._saved == self.progress:
            return
        self._divergence.check_finite()
        progress = replace(self.progress)
        self._saver.save(
            progress.step,
            self.learner.model,
            {**self.learner.state_dict(), "progress": asdict(progress)},
            # Without validation, the last checkpoint counts as the best.
            best=progress.best_step == progress.step or not self.learner.loader.validates,
            also_before=self._divergence.needed_before(),
        )
        self._saved = progress

    def restore(self, chosen: Path) -> None:
        """Continue from the checkpoint `chosen`; changed settings keep their new values."""
        self._saver.wait()
        load_model_weights(chosen, self.learner.model)
        state = checkpoint.load_learner_state(chosen, self.learner.model)
        # It may be an older one; after a stop before the next save, the run must continue from it again.
        self.ranks.from_main(lambda: files.point_to(self._checkpoints / "latest", chosen.name))
        if not state:
            return  # initial weights, without training state
        self.progress = Progress.from_json(state["progress"], str(chosen))
        # Old checkpoints store the step in their progress only.
        self.learner.load_state_dict({"step": self.progress.step, **state})
        self._saved = replace(self.progress)
        # A kill may have come between writing a checkpoint and its link.
        best = self._checkpoints / checkpoint.checkpoint_name(self.progress.best_step)
        if self.ranks.is_main and self.progress.best_step and best.exists():
            files.point_to(self._checkpoints / "best", best.name)


def sample_heading(step: int) -> str:
    """The heading of the sample of `step` in `samples.txt`."""
    return f"--- step {step}\n"
