"""`import`: turn a public checkpoint into a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tyro

from minitransformer import files, pretrained
from minitransformer.amounts import amount
from minitransformer.commands import DONE, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.generation.published import published
from minitransformer.models.model import count_trained
from minitransformer.pretrained.originals import inherit_originals, keep_originals
from minitransformer.pretrained.peft_folders import PEFT_CONFIG, fill_adapter, read_adapter
from minitransformer.pretrained.vocabularies import how_to_make_one
from minitransformer.runs import GENERATION, Run, check_free, free_run_path, only_writer
from minitransformer.runs.begin import check_merges
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.finetuning import starting_model
from minitransformer.training.objectives import Objective
from minitransformer.training.weights import Parent


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
    about = "Turn a public checkpoint into a run, to sample from or to fine-tune."
    options = parse(Options, arguments, prog="minitransformer import", description=about)
    path = options.out or free_run_path(Path(options.checkpoint).name)
    check_free(path)
    if options.base is not None:
        return _import_adapter(Path(options.checkpoint), Run.open(options.base), path)
    if (Path(options.checkpoint) / PEFT_CONFIG).is_file():
        raise UserError(f"{options.checkpoint} is an adapter of peft: name the run of its base with --base")
    folder = pretrained.checkpoint_folder(options.checkpoint)
    model, tokenizer = pretrained.load(folder)
    if tokenizer is None:
        raise UserError(how_to_make_one(options.checkpoint))
    topology = model.config.topology
    generation = pretrained.generation_config(folder)
    if generation is not None:
        published(
            generation, GENERATION, two_sided=topology == "encoder-decoder"
        )  # report unsupported settings now, not at the first sample
    objectives = [name for name, objective in Objective.registry.items() if topology in objective.topologies]
    # A common learning rate for training from scratch; fine-tuning uses a tenth of it.
    training = TrainingConfig(objective=objectives[0] if objectives else "causal", lr=3e-4)

    def add_files(run: Path) -> None:
        keep_originals(folder, run)
        if generation is not None:
            files.write_text(run / GENERATION, json.dumps(generation, indent=2) + "\n")

    with only_writer(path):
        config = RunConfig(model.config, DataConfig(tokenizer=tokenizer.name), training)
        Run.create(path, config, tokenizer, tokenizer, initial=model, add_files=add_files)
    print(f"model      {topology}, {amount(model.num_parameters())} parameters")
    print(f"tokenizer  {tokenizer.name}, {tokenizer.vocab_size:,} tokens")
    print(f"run        {path}")
    more = f", or python train.py --init-from {path} --data ..." if objectives else ""
    print(f"next       python sample.py {path}{more}")
    return DONE


def _import_adapter(folder: Path, base: Run, path: Path) -> int:
    """A run of the adapter in the folder of peft, with its base."""
    check_merges(base)
    adapter, weights = read_adapter(folder, base.config.model.base)
    checkpoint = base.checkpoint()
    parent = Parent.of(base.path.absolute(), checkpoint)
    training = replace(base.config.training, freeze=())
    config = replace(base.config, model=replace(base.config.model, adapter=adapter), training=training)
    initial = starting_model(config, base.load_model(checkpoint.name))
    initial.base = parent
    fill_adapter(initial, weights)
    with only_writer(path):
        Run.create(
            path,
            config,
            base.tokenizer,
            base.target_tokenizer,
            parent=parent,
            initial=initial,
            add_files=partial(inherit_originals, base.path),
        )
    print(f"adapter    {adapter.name} of {amount(count_trained(config.model))} parameters, for {base.path}")
    print(f"run        {path}")
    return DONE
