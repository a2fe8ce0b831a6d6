"""Run folders: what a training run leaves behind, and what every other command starts from."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained.shards import read_json
from minitransformer.pretrained.tokenizers import (
    CONFIGS,
    PublicTokenizer,  # noqa: F401  (which a run may have: it registers)
)
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import choose_checkpoint, load_model_weights
from minitransformer.training.config import RunConfig
from minitransformer.training.finetuning import Parent
from minitransformer.training.machine import Resolved

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
GENERATION = CONFIGS[1]
TOKENIZER, TARGET_TOKENIZER = "tokenizer.json", "target-tokenizer.json"


def provenance() -> dict[str, str]:
    """Which code made a run, on what, by which command."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "minitransformer": version("minitransformer"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": shlex.join(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Run:
    """A run folder: `config.json`, `tokenizer.json`, `metrics.jsonl`, `train.log`, `samples.txt` and `checkpoints/`.

    A run with two vocabularies has `target-tokenizer.json` too; an import may have `generation_config.json`.
    """

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """of what the model writes: `tokenizer` itself, unless it has a vocabulary of its own"""
    text: str
    """which prepared text it learns, so that resuming notices another"""
    machine: Resolved | None = None
    """what it trains on and how; None where nothing was trained, or an older version did it"""
    parent: Parent | None = None
    """whose weights it began with; None from scratch"""

    @classmethod
    def create(
        cls,
        path: Path,
        config: RunConfig,
        tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
        text: str = "",
        machine: Resolved | None = None,
        parent: Parent | None = None,
    ) -> Run:
        """A new run folder; `config.json` is written last, and makes it one."""
        (path / CHECKPOINTS).mkdir(parents=True)
        tokenizer.save(path / TOKENIZER)
        if target_tokenizer is not tokenizer:
            target_tokenizer.save(path / TARGET_TOKENIZER)
        return cls(path, config, tokenizer, target_tokenizer, text, machine, parent).reconfigured(config)

    def reconfigured(self, config: RunConfig, machine: Resolved | None = None) -> Run:
        """This run with another configuration, which is written down with the code and the command behind it.

        `machine` replaces what it was trained on until now.
        """
        run = replace(self, config=config, machine=machine or self.machine)
        origins = {"machine": run.machine, "parent": run.parent}
        about = {name: origin.to_json() for name, origin in origins.items() if origin is not None}
        record = {**config.to_json(), "text": self.text, **about, "provenance": provenance()}
        files.write_text(self.path / CONFIG, json.dumps(record, indent=2) + "\n")
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in the folder `path`; raises `UserError` if it is none."""
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} is not a run folder (it has no {CONFIG}): give a folder that training has made")
        try:
            record = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / CONFIG} is damaged ({error}): restore it, or train anew") from None
        config = RunConfig.from_json(record, str(path / CONFIG))
        tokenizer = Tokenizer.load(path / TOKENIZER)
        own = path / TARGET_TOKENIZER
        target_tokenizer = Tokenizer.load(own) if own.exists() else tokenizer
        machine = Resolved.from_json(record.get("machine"), str(path / CONFIG))
        parent = Parent.from_json(record.get("parent"), str(path / CONFIG))
        return cls(path, config, tokenizer, target_tokenizer, record.get("text", ""), machine, parent)

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """Of what the model reads and, if that has another vocabulary, of what it writes."""
        both = [self.tokenizer, self.target_tokenizer]
        return both if self.target_tokenizer is not self.tokenizer else both[:1]

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """How the publisher of an import would have it generate, if that is known; raises `UserError` if damaged."""
        path = self.path / GENERATION
        return read_json(path) if path.is_file() else None

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def cased(self, text: str) -> str:
        """`text` as this run reads it: in lower case, where that was asked for."""
        return text.lower() if self.config.data.lowercase else text

    def checkpoint(self, name: str | None = None) -> Path:
        """The whole checkpoint called `name`, by default the best, or the latest if none is called that."""
        if name is None and (self.checkpoints / "best").exists():
            name = "best"
        return choose_checkpoint(self.checkpoints, name)

    def load_model(self, checkpoint: str | None = None, device: str = "cpu") -> Model:
        """The model of this run, ready to be evaluated, from `checkpoint`: by default the best one."""
        chosen = self.checkpoint(checkpoint)
        model = build_model(self.config.model)
        load_model_weights(chosen, model)
        return model.to(device).eval()


def latest_run(root: Path = Path("runs")) -> Path:
    """The run below `root` that was written to last; raises `UserError` if there is none."""
    found = [path.parent for path in root.glob(f"*/{CONFIG}")]
    if not found:
        raise UserError(f"there is no run in {root}/: train one with `python train.py`, or name its folder")
    return max(found, key=lambda path: (path / CHECKPOINTS).stat().st_mtime if (path / CHECKPOINTS).exists() else 0)


def data_name(data: str) -> str:
    """A short name for the recipe, file, folder or glob `data`: its last part that says something, without endings."""
    for part in reversed(Path(data if data.strip("./") else os.path.abspath(data)).parts):
        name = re.sub(r"(\.[A-Za-z]\w*)+$", "", re.sub(r"[*?\[\]]+", "", part))
        if name := re.sub(r"[^\w.+-]+", "-", name).strip(".-"):
            return name
    return "data"


def free_run_path(name: str, root: Path = Path("runs")) -> Path:
    """A path below `root` that nothing has yet: `name`, or `name` with a number."""
    candidates = [root / name, *(root / f"{name}-{i}" for i in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())
