"""`import`: turn a public checkpoint into a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from minitransformer.amounts import amount
from minitransformer.commands import DONE, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.models.model import count_parameters, count_trained
from minitransformer.pretrained.peft_folders import PEFT_CONFIG
from minitransformer.runs import Run, free_run_path
from minitransformer.runs.importing import import_adapter, import_checkpoint
from minitransformer.training.objectives import Objective


@dataclass(frozen=True)
class Options:
    """Which checkpoint to import, and where to."""

    checkpoint: tyro.conf.Positional[str]
    """folder with config.json and safetensors, or a name on the Hugging Face hub"""
    base: Path | None = None
    """run folder of the base, for an adapter in a folder of the peft library"""
    out: Path | None = None
    """folder of the new run; None is runs/NAME"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Import; returns the exit code."""
    about = "Turn a public checkpoint into a run, to sample from, to embed texts with or to fine-tune."
    options = parse(Options, arguments, prog="minitransformer import", description=about)
    path = options.out or free_run_path(Path(options.checkpoint).name)
    if options.base is not None:
        run = import_adapter(Path(options.checkpoint), Run.open(options.base), path)
        size = amount(count_trained(run.config.model))
        print(f"adapter    {run.config.model.adapter.name} of {size} parameters, for {options.base}\nrun        {path}")
        return DONE
    if (Path(options.checkpoint) / PEFT_CONFIG).is_file():
        raise UserError(f"{options.checkpoint} is an adapter of peft: name the run of its base with --base")
    run = import_checkpoint(options.checkpoint, path)
    topology = run.config.model.topology
    print(f"model      {topology}, {amount(count_parameters(run.config.model))} parameters")
    print(f"tokenizer  {run.tokenizer.name}, {run.tokenizer.vocab_size:,} tokens")
    print(f"run        {path}")
    use = f"python -m minitransformer embed {path}" if topology == "encoder-headless" else f"python sample.py {path}"
    is_trained = any(topology in objective.topologies for objective in Objective.registry.values())
    print(f"next       {use}" + (f", or python train.py --init-from {path} --data ..." if is_trained else ""))
    return DONE
