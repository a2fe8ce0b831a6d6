"""Going on with a run: what may be changed of it, and from which checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitransformer.errors import StorageError, UserError
from minitransformer.runs.open import Run
from minitransformer.settings import flat
from minitransformer.text.corpora import named
from minitransformer.text.datasets import PreparedData
from minitransformer.training.checkpoint import check_weights, checkpoint_step, checkpoints_in, load_progress
from minitransformer.training.config import RunConfig, fixed_settings
from minitransformer.training.loop import SAMPLES, sample_heading


def check_can_resume(run: Run) -> None:
    """Raises `UserError` for a run that was imported."""
    if not run.text:
        path = run.path
        raise UserError(f"{path} was imported, and no training of it can go on: begin one with --init-from {path}")


def check_same_text(run: Run, config: RunConfig, prepared: PreparedData) -> None:
    """Raises `UserError` unless `prepared`, the data of `config`, is what `run` began with."""
    if prepared.folder.name != run.text:
        raise UserError(
            f"{named(config.data.data)} is not the text that {run.path} began with: restore it, or train a new run"
        )


def changed_settings(old: RunConfig, new: RunConfig, silent: Sequence[str] = ()) -> list[str]:
    """Which settings a resumed run changes, in words, but the `silent` ones.

    Raises `UserError` for those that would make it another run.
    """
    before, after, fixed = flat(old), flat(new), {**fixed_settings(old), **fixed_settings(new)}
    changes = []
    for name in before | after:
        a, b = before.get(name), after.get(name)
        if a != b and name in fixed:
            raise UserError(f"this run has {name} {a}, and resuming cannot make it {b}: train a new run for that")
        if a != b and name not in silent:
            changes.append(f"{name} {a} -> {b}")
    return changes


def checkpoint_to_resume(run: Run, config: RunConfig, name: str | None) -> Path | None:
    """The checkpoint called `name`, by default the latest; None for a run that was stopped before its first one.

    Raises `UserError` for a run that has done all that `config` asks for.
    """
    if name is None and not checkpoints_in(run.checkpoints):
        if run.parent is not None:
            raise StorageError(f"{run.path} has lost the weights that it began with: begin anew with --init-from")
        return None
    checkpoint = run.checkpoint_to_continue(name)
    check_weights(checkpoint, config.model)
    step, steps, patience = checkpoint_step(checkpoint), config.training.steps, config.training.patience
    if step < steps and patience is None:
        return checkpoint
    progress = load_progress(checkpoint)
    ended = _has_ended(run, step, progress)
    if step > steps or (step == steps and ended):
        raise UserError(f"{run.path} has done its {steps} steps: give a larger --steps to extend it")
    worse = progress.get("validations_since_best", 0)
    if patience is not None and worse >= patience and ended:
        raise UserError(f"{run.path} stopped early, after {worse} validations that were no better: raise --patience")
    return checkpoint


def _has_ended(run: Run, step: int, progress: dict[str, Any]) -> bool:
    """Whether the last validation and the sample are there as well; a signal may have come before them."""
    samples = run.path / SAMPLES
    validated = not run.config.data.validates or progress.get("validated_step") == step
    return validated and samples.exists() and sample_heading(step) in samples.read_text("utf-8", "replace")
