"""Run folders: what a training run leaves behind, and what every other command starts from."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained.tokenizers import PublicTokenizer  # noqa: F401  (which a run may have: it registers)
from minitransformer.records import read_json
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import check_weights, choose_checkpoint, load_model_weights
from minitransformer.training.config import RunConfig

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
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

    A run with two vocabularies has `target-tokenizer.json` too.
    """

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    """of what the model writes: `tokenizer` itself, unless it has a vocabulary of its own"""
    text: str
    """which prepared text it learns, so that resuming notices another"""

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, tokenizer: Tokenizer, target_tokenizer: Tokenizer, text: str = ""
    ) -> Run:
        """A new run folder; `config.json` is written last, and makes it one."""
        (path / CHECKPOINTS).mkdir(parents=True)
        tokenizer.save(path / TOKENIZER)
        if target_tokenizer is not tokenizer:
            target_tokenizer.save(path / TARGET_TOKENIZER)
        return cls(path, config, tokenizer, target_tokenizer, text).reconfigured(config)

    def reconfigured(self, config: RunConfig) -> Run:
        """This run with another configuration, which is written down with the code and the command behind it."""
        record = {**config.to_json(), "text": self.text, "provenance": provenance()}
        files.write_text(self.path / CONFIG, json.dumps(record, indent=2) + "\n")
        return replace(self, config=config)

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in the folder `path`; raises `UserError` if it is none."""
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} is not a run folder (it has no {CONFIG}): give a folder that training has made")
        record = read_json(path / CONFIG, "restore it, or train anew")
        config = RunConfig.from_json(record, str(path / CONFIG))
        tokenizer = Tokenizer.load(path / TOKENIZER)
        own = path / TARGET_TOKENIZER
        target_tokenizer = Tokenizer.load(own) if own.exists() else tokenizer
        return cls(path, config, tokenizer, target_tokenizer, str(record.get("text", "")))

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """Of what the model reads and, if that has another vocabulary, of what it writes."""
        both = [self.tokenizer, self.target_tokenizer]
        return both if self.target_tokenizer is not self.tokenizer else both[:1]

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
        check_weights(chosen, self.config.model)
        model = build_model(self.config.model)
        load_model_weights(chosen, model)
        return model.to(device).eval()


def latest_run(root: Path = Path("runs")) -> Path:
    """The run below `root` that was written to last; raises `UserError` if there is none."""
    found = [path.parent for path in root.glob(f"*/{CONFIG}")]
    if not found:
        raise UserError(f"there is no run in {root}/: train one with `python train.py`, or name its folder")
    return max(found, key=lambda path: (path / CHECKPOINTS).stat().st_mtime if (path / CHECKPOINTS).exists() else 0)


def free_run_path(name: str, root: Path = Path("runs")) -> Path:
    """A path below `root` that nothing has yet: `name`, or `name` with a number."""
    candidates = [root / name, *(root / f"{name}-{i}" for i in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())
