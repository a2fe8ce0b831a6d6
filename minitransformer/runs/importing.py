"""Public checkpoints as runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from minitransformer import files, pretrained
from minitransformer.errors import UserError
from minitransformer.generation.published import published
from minitransformer.pretrained.checkpoint import checkpoint_digest, is_checkpoint
from minitransformer.pretrained.gguf_files import is_gguf
from minitransformer.pretrained.originals import inherit_originals, keep_originals
from minitransformer.pretrained.peft_folders import fill_adapter, read_adapter
from minitransformer.pretrained.sentences import module_kinds
from minitransformer.pretrained.tokenizers import load_target_tokenizer
from minitransformer.pretrained.vocabularies import how_to_make_one
from minitransformer.runs.begin import check_merges
from minitransformer.runs.layout import CONFIG, GENERATION, check_free, only_writer
from minitransformer.runs.open import Run
from minitransformer.training.config import RunConfig, TrainingConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.finetuning import starting_model
from minitransformer.training.objectives import Objective
from minitransformer.training.weights import Parent

# A common learning rate for training from scratch; fine-tuning uses a tenth of it.
RATE = 3e-4


def import_checkpoint(name: str, path: Path) -> Run:
    """The new run at `path` with the model of the public checkpoint `name`, a folder or a name on the hub.

    Raises `UserError` for a checkpoint that cannot be opened, before anything is written.
    """
    check_free(path)
    with pretrained.checkpoint_files(name) as folder:
        return _imported(name, folder, path)


def _imported(name: str, folder: Path, path: Path) -> Run:
    """`import_checkpoint`, where `folder` has the files besides the weights."""
    model, tokenizer = pretrained.load(name if is_gguf(name) else folder)
    if tokenizer is None:
        raise UserError(how_to_make_one(name))
    topology, generation = model.config.topology, pretrained.generation_config(folder)
    # What is not supported is reported now, and not at the first sample or embedding.
    module_kinds(folder)
    if generation is not None:
        published(generation, GENERATION, two_sided=topology == "encoder-decoder")
    objectives = [name for name, objective in Objective.registry.items() if topology in objective.topologies]
    training = TrainingConfig(objective=objectives[0] if objectives else "causal", lr=RATE)

    def add_files(run: Path) -> None:
        keep_originals(folder, run)
        if generation is not None:
            files.write_text(run / GENERATION, json.dumps(generation, indent=2) + "\n")

    with only_writer(path):
        config = RunConfig(model.config, DataConfig(tokenizer=tokenizer.name), training)
        tokenizers = (tokenizer, load_target_tokenizer(folder, tokenizer))
        return Run.create(path, config, *tokenizers, initial=model, add_files=add_files)


def import_adapter(folder: Path, base: Run, path: Path) -> Run:
    """The new run at `path` with the adapter in a folder of peft, for the model of `base`.

    Raises `UserError` for an adapter that cannot be opened, or of another base.
    """
    check_free(path)
    check_merges(base)
    adapter, weights = read_adapter(folder, base.config.model.base)
    checkpoint = base.checkpoint()
    parent = Parent.of(base.path.absolute(), checkpoint)
    training = replace(base.config.training, freeze=())
    config = replace(base.config, model=replace(base.config.model, adapter=adapter), training=training)
    initial = starting_model(config, checkpoint)
    initial.base = parent
    fill_adapter(initial, weights)
    with only_writer(path):
        tokenizers, inherit = (base.tokenizer, base.target_tokenizer), partial(inherit_originals, base.path)
        return Run.create(path, config, *tokenizers, parent=parent, initial=initial, add_files=inherit)


def as_run(name: str, root: Path) -> Path:
    """The folder of the run `name`; of a public checkpoint, that of its import in `root`, which is made if necessary.

    A folder that is named by the content of the checkpoint need not be made again.
    """
    if not is_checkpoint(name):
        return Path(name)
    folder = Path(name) if is_gguf(name) else pretrained.checkpoint_folder(name)
    path = root / f"{Path(name).resolve().name}-{checkpoint_digest(folder)[:8]}"
    return path if (path / CONFIG).is_file() else import_checkpoint(str(folder), path).path
