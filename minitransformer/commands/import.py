"""`import`: make a run of a public checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minitransformer import files, pretrained
from minitransformer.commands import DONE, parse, run_command
from minitransformer.errors import UserError
from minitransformer.pretrained.originals import keep_originals
from minitransformer.pretrained.vocabularies import how_to_make_one
from minitransformer.runs import Run, free_run_path
from minitransformer.training.checkpoint import write_checkpoint
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.objectives import Objective


@dataclass(frozen=True)
class Options:
    """Which checkpoint becomes a run."""

    checkpoint: tyro.conf.Positional[str]
    """folder with config.json and safetensors, or a name on the Hugging Face hub"""
    out: Path | None = None
    """folder of the new run; None is runs/NAME"""


def main(arguments: Sequence[str]) -> int:
    """Import; returns the exit code."""
    return run_command(lambda: _import(arguments))


def _import(arguments: Sequence[str]) -> int:
    about = "Make a run of a public checkpoint, to sample from, or to train on."
    options = parse(Options, arguments, prog="minitransformer import", description=about)
    path = options.out or free_run_path(Path(options.checkpoint).name)
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out")
    folder = pretrained.checkpoint_folder(options.checkpoint)
    model, tokenizer = pretrained.load(folder)
    if tokenizer is None:
        raise UserError(how_to_make_one(options.checkpoint))
    topology = model.config.topology
    objectives = [name for name, objective in Objective.registry.items() if topology in objective.topologies]
    training = TrainingConfig(objective=objectives[0] if objectives else "causal")
    with files.writing(path, "choose an --out on another disk"):
        config = RunConfig(model.config, DataConfig(tokenizer=tokenizer.name), training)
        run = Run.create(path, config, tokenizer, tokenizer)
        keep_originals(folder, path)
        write_checkpoint(run.checkpoints, 0, model, {})
    print(f"model      {topology}, {model.num_parameters() / 1e6:.2f}M parameters")
    print(f"tokenizer  {tokenizer.name}, {tokenizer.vocab_size:,} tokens")
    print(f"run        {path}")
    more = f", or python train.py --init-from {path} --data ..." if objectives else ""
    print(f"next       python sample.py {path}{more}")
    return DONE
