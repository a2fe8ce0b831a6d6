"""Resuming a run: which settings may change, and which checkpoint it continues from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitransformer.errors import StorageError, UserError
from minitransformer.runs.open import Run
from minitransformer.settings import flat
from minitransformer.text.corpora import named
from minitransformer.text.datasets import PreparedData
from minitransformer.training.checkpoint import checkpoint_step, checkpoints_in, fixed_settings, load_progress
from minitransformer.training.config import RunConfig
from minitransformer.training.loop import SAMPLES, sample_heading
from minitransformer.training.weights import check_weights


def check_can_resume(run: Run) -> None:
    """Raises `UserError` for a run without training, for links, which lead elsewhere, and for pipes, which block."""
    if links := sorted(path for path in run.path.iterdir() if path.is_symlink()):
        raise UserError(
            f"{links[0]} is a link, and resuming the run would write to what it names: put what it names in its place"
        )
    if others := sorted(path for path in run.path.iterdir() if not path.is_file() and not path.is_dir()):
        raise UserError(f"{others[0]} is neither a file nor a folder, and resuming could wait for it: remove it")
    if not run.trains:
        raise UserError(
            f"{run.path} was not made by train.py, and has no training to resume: fine-tune it by --init-from "
            f"{run.path}, in a new folder"
        )


def check_same_text(run: Run, config: RunConfig, prepared: PreparedData) -> None:
    """Raises `UserError` unless `prepared`, the data of `config`, is the original data of `run`."""
    if prepared.folder.name != run.text:
        now = prepared.sources
        shard = next((path for path, digest in run.sources.items() if now.get(path, digest) != digest), None)
        what = named(config.data.data) if shard is None else f"shard {shard} of {named(config.data.data)}"
        raise UserError(f"{what} is not the text that {run.path} started with: restore it, or train a new run")


def changed_settings(old: RunConfig, new: RunConfig, silent: Sequence[str] = ()) -> list[str]:
    """The settings that a resumed run changes, in words, except the `silent` ones.

    Raises `UserError` for settings that cannot change on resume.
    """
    before, after, fixed = flat(old), flat(new), {**fixed_settings(old), **fixed_settings(new)}
    changes = []
    for name in before | after:
        a, b = before.get(name), after.get(name)
        if a != b and name in fixed:
            raise UserError(f"this run has {name} {a}, which cannot change to {b} on resume: train a new run")
        if a != b and name not in silent:
            changes.append(f"{name} {a} -> {b}")
    return changes


def checkpoint_to_resume(run: Run, config: RunConfig, name: str | None) -> Path | None:
    """The checkpoint `name`, by default the latest; None for a run that was stopped before its first one.

    Raises `UserError` for a run that is complete for `config`.
    """
    if name is None and not checkpoints_in(run.checkpoints):
        if run.parent is not None:
            raise StorageError(f"{run.path} has lost its initial weights: start a new run with --init-from")
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
        raise UserError(f"{run.path} stopped early, after {worse} validations without improvement: raise --patience")
    return checkpoint


def _has_ended(run: Run, step: int, progress: dict[str, Any]) -> bool:
    """Whether the last validation and sample are complete; a signal may have come before them."""
    samples = run.path / SAMPLES
    validated = not run.config.data.validates or progress.get("validated_step") == step
    return validated and samples.is_file() and sample_heading(step) in samples.read_text("utf-8", "replace")
