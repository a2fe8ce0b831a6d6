"""Run folders: the output of training, and the input of every other command."""

from minitransformer.runs.layout import (
    CONFIG,
    GENERATION,
    REMEDY,
    check_free,
    claimed_run_path,
    clear,
    free_run_path,
    latest_run,
    only_writer,
    only_writer_of,
    provenance,
)
from minitransformer.runs.open import Run

__all__ = [
    "CONFIG",
    "GENERATION",
    "REMEDY",
    "Run",
    "check_free",
    "claimed_run_path",
    "clear",
    "free_run_path",
    "latest_run",
    "only_writer",
    "only_writer_of",
    "provenance",
]
