"""Summary of a training run: its last and best validation, and whether it overfits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from minitransformer.training.logging import records_until
from minitransformer.training.progress import Progress
from minitransformer.training.validation import Validation

NOTABLE = 0.01
"""rise of the validation loss and fall of the training loss, in nats per target, that count as overfitting"""


def describe(validation: Validation, progress: Progress, metrics: Path, window: int) -> list[str]:
    """Lines for the terminal; training losses are means over `window` steps in `metrics`, a metrics.jsonl."""
    if progress.best_step == progress.step:
        return [f"validation {validation} (best at step {progress.step})"]
    lines = [f"validation {validation} (last, at step {progress.step})"]
    if not progress.best_step:
        return [*lines, "best       no validation had a finite loss"]
    same = "" if validation.subset_loss is None else f"; on the same tokens, the last has {validation.subset_loss:.4f}"
    lines.append(
        f"best       loss {progress.best_loss:.4f} (at step {progress.best_step}); the sample is of its weights{same}"
    )
    records = records_until(metrics, progress.step)
    before, after = (_training_loss(records, step, window) for step in (progress.best_step, progress.step))
    rise = validation.comparable_loss - progress.best_loss
    if rise > NOTABLE and before - after > NOTABLE:
        lines.append(
            f"parted     since step {progress.best_step} the training loss fell from {before:.4f} to {after:.4f}, and "
            f"validation rose by {rise:.4f}: the model\n           learns its text by heart; more text, fewer --steps "
            "or --dropout help"
        )
    return lines


def _training_loss(records: list[dict[str, Any]], step: int, window: int) -> float:
    """The mean logged loss in the `window` steps up to `step`; NaN if none was logged."""
    near = [record["loss"] for record in records if step - window < record["step"] <= step and record.get("loss")]
    return sum(near) / len(near) if near else math.nan
