"""The history of a run: its settings and logged metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minitransformer import files
from minitransformer.analysis.known_settings import PARTS, flat_settings, settings_with
from minitransformer.analysis.verdicts import is_number, last_value, series
from minitransformer.errors import StorageError, UserError
from minitransformer.files import sha256
from minitransformer.records import read_bytes, read_json
from minitransformer.training.logging import parse_record

CONFIG, METRICS = "config.json", "metrics.jsonl"
TOKENIZERS = "tokenizer.json", "target-tokenizer.json"
Abscissa = Literal["step", "tokens", "seconds"]


@dataclass(frozen=True)
class History:
    """The settings and logged metrics of a run folder.

    It is read without the model's code, so that runs of other versions, with other settings, open too.
    """

    path: Path
    config: dict[str, Any]
    """content of `config.json`"""
    records: tuple[dict[str, Any], ...]
    damaged: int
    """number of invalid lines, as after a crash, which are skipped"""

    @classmethod
    def open(cls, path: Path) -> History:
        """Open the run folder `path`; raises `UserError` if it is not a run, or has no metrics."""
        config = _config(path)
        file = path / METRICS
        text = read_bytes(file, "leave the run out").decode(errors="replace") if file.is_file() else ""
        parsed = [parse_record(line) for line in text.split("\n") if line.strip()]
        records = tuple(record for record in parsed if record is not None)
        if not records:
            raise UserError(f"{path} has no metrics in {METRICS}: train it for some steps, or leave it out")
        return cls(path, config, records, len(parsed) - len(records))

    @property
    def seed(self) -> int:
        return int(self.config["training"]["seed"])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its settings by flat name, without the seed, and the hash of its text."""
        values = flat_settings(self.config, str(self.path / CONFIG))
        values["text"], values["parent"] = self.config.get("text", ""), _parent(self.config.get("parent"))
        silent = settings_with("observes_only")
        # None if the run is older than the setting.
        return {name: value for name, value in values.items() if name not in silent and value is not None}

    @cached_property
    def tokenizers(self) -> tuple[str, ...]:
        """SHA-256 of its tokenizer files: equal for equivalent tokenizers."""
        return tuple(sha256(self.path / name) for name in TOKENIZERS if (self.path / name).is_file())

    @cached_property
    def metrics(self) -> set[str]:
        """The names of its metrics."""
        return {name for record in self.records for name, value in record.items() if is_number(value)}

    def series(self, metric: str) -> dict[int, float]:
        """`metric` by step; NaN where it was not finite."""
        return series(self.records, metric)

    def last(self, metric: str) -> float | None:
        """The last value; None if there is none."""
        return last_value(self.records, metric)

    def lowest(self, metric: str) -> float | None:
        """The lowest finite value; None if there is none."""
        return min((value for value in self.series(metric).values() if math.isfinite(value)), default=None)

    @property
    def steps(self) -> int:
        return max(record["step"] for record in self.records)

    def abscissa(self, steps: Sequence[int], by: Abscissa) -> np.ndarray:
        """`steps` on the axis `by`, interpolated linearly between records."""
        if by == "step":
            return np.asarray(steps, dtype=float)
        known = {0: 0.0, **self.series(by)}
        return np.interp(steps, list(known), list(known.values()))


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} is not a run folder (it has no {CONFIG}): give the output folder of train.py")
    try:
        config: dict[str, Any] = files.unsealed(read_json(file, "restore it, or leave the run out"))
    except ValueError as error:
        raise StorageError(f"{file} was changed after training ({error}): restore it, or leave the run out") from None
    whole = all(isinstance(config.get(part), dict) for part in PARTS)
    if not whole or not isinstance(config["training"].get("seed"), int):
        raise UserError(f"{file} is not a configuration with {', '.join(PARTS)} and a seed: leave the run out")
    return config


def _parent(record: Any) -> str | None:
    """Name and hash of the weights that a run started from; None from scratch."""
    if not isinstance(record, dict):
        return None
    folder, checkpoint, digest = (str(record.get(name, "")) for name in ("path", "checkpoint", "sha256"))
    return f"{Path(folder).name} {checkpoint} ({digest[:8]})"
