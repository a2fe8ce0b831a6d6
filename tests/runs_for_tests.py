"""Small runs on real code: a text, a configuration, and the trainer between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minitransformer.models.config import ModelConfig
from minitransformer.runs import Run
from minitransformer.settings import all_declared, with_settings
from minitransformer.text.corpora import open_corpus
from minitransformer.text.prepare import PreparedText, prepare
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.logging import Logs, RunFiles
from minitransformer.training.loop import Trainer
from minitransformer.training.machine import Machine
from minitransformer.training.signals import StopRequest

TEXT = "".join(f"Line {i}: the {'quick brown' if i % 3 else 'slow red'} fox counts {i * i}.\n" for i in range(200))

TINY = RunConfig(
    model=ModelConfig(d_model=16, num_layers=2, num_heads=2, context_length=16, vocab_size=260),
    data=DataConfig(tokenizer="bytes"),
    training=TrainingConfig(
        steps=12, batch_size=2, lr=1e-2, warmup_steps=2, eval_every=5, save_every=3, log_every=1, precision="fp32"
    ),
)


def configured(config: RunConfig = TINY, **changes: object) -> RunConfig:
    """`config` with changed settings, wherever they belong."""
    return with_settings(config, changes)


def chosen_for(record: type, name: str) -> dict[str, str]:
    """The choices without which a configuration has no setting of this name."""
    owners = [each.variant for each in all_declared(record) if each.name == name]
    choices: dict[str, str] = {}
    while owners and owners[0] is not None:
        choice = next(
            each for each in all_declared(record) if each.family and owners[0] in each.family.registry.values()
        )
        choices[choice.name] = owners[0].name
        owners = [choice.variant]
    return choices


def prepared_text(folder: Path, text: str = TEXT) -> PreparedText:
    source = folder / "text.txt"
    if not source.exists():
        source.write_text(text)
    return prepare(
        open_corpus(str(source)), "bytes", context_length=16, cache=folder / "cache", workers=1, progress=False
    )


def trainer_for(
    path: Path, text: PreparedText, config: RunConfig, stop: StopRequest | None = None, resume_at: int = 0
) -> Trainer:
    """A trainer in the run folder `path`, which is made unless it is there."""
    run = (
        Run.open(path).reconfigured(config)
        if path.exists()
        else Run.create(path, config, text.tokenizer, text.target_tokenizer, text.folder.name)
    )
    machine = Machine(torch.device("cpu"), config.training.precision, compile=False, description="")
    log = Logs(RunFiles(path, resume_at=resume_at))
    return Trainer(run, text, machine, log, stop or StopRequest(), sample=lambda model, objective: "a sample")


def unsealed(path: Path) -> dict[str, Any]:
    """The record in the file at `path`, without the checksum that would notice a change."""
    record: dict[str, Any] = json.loads(path.read_text())
    del record["checksum"]
    return record
