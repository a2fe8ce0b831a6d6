"""`import`: turn a public checkpoint into a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minitransformer.amounts import amount
from minitransformer.commands import DONE, parse, with_exit_code
from minitransformer.models.model import count_parameters
from minitransformer.runs import free_run_path
from minitransformer.runs.importing import import_checkpoint
from minitransformer.training.objectives import Objective


@dataclass(frozen=True)
class Options:
    """Which checkpoint to import, and where to."""

    checkpoint: tyro.conf.Positional[str]
    """folder with config.json and safetensors, or a name on the Hugging Face hub"""
    out: Path | None = None
    """folder of the new run; None is runs/NAME"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Import; returns the exit code."""
    about = "Turn a public checkpoint into a run, to sample from, to embed texts with or to fine-tune."
    options = parse(Options, arguments, prog="minitransformer import", description=about)
    path = options.out or free_run_path(Path(options.checkpoint).name)
    run = import_checkpoint(options.checkpoint, path)
    topology = run.config.model.topology
    print(f"model      {topology}, {amount(count_parameters(run.config.model))} parameters")
    print(f"tokenizer  {run.tokenizer.name}, {run.tokenizer.vocab_size:,} tokens")
    print(f"run        {path}")
    use = f"python -m minitransformer embed {path}" if topology == "encoder-headless" else f"python sample.py {path}"
    is_trained = any(topology in objective.topologies for objective in Objective.registry.values())
    print(f"next       {use}" + (f", or python train.py --init-from {path} --data ..." if is_trained else ""))
    return DONE
