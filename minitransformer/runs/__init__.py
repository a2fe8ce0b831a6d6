"""Run folders: what a training run leaves behind, and what every other command starts from."""

from minitransformer.runs.layout import (
    GENERATION,
    REMEDY,
    check_free,
    claimed_run_path,
    clear,
    free_run_path,
    latest_run,
    only_writer,
    provenance,
)
from minitransformer.runs.open import Run

__all__ = [
    "GENERATION",
    "REMEDY",
    "Run",
    "check_free",
    "claimed_run_path",
    "clear",
    "free_run_path",
    "latest_run",
    "only_writer",
    "provenance",
]
