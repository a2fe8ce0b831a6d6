"""Starting a run, from scratch or from the weights of another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.adapters import freeze_matching
from minitransformer.models.model import Model, build_model, in_full_precision, model_without_storage
from minitransformer.pretrained.chat import published_names, published_special_tokens
from minitransformer.pretrained.originals import CHAT, inherit_originals
from minitransformer.runs.layout import check_free
from minitransformer.runs.open import Run
from minitransformer.text.datasets import Conversations, Labels, PreparedData
from minitransformer.text.datasets.conversation_preparation import PreparedConversations
from minitransformer.training.config import RunConfig, with_usual_vocabulary
from minitransformer.training.finetuning import check_fits, starting_model
from minitransformer.training.logging import TensorBoard
from minitransformer.training.machine import Resolved, choose_device, choose_precision
from minitransformer.training.parallel import parallel_over
from minitransformer.training.ranks import Ranks
from minitransformer.training.weights import Parent

HEADS = ("head", "next_sentence")
"""modules of a model that predict"""


def check_possible(config: RunConfig, out: Path | None, ranks: Ranks, parent: Run | None = None) -> None:
    """Raises `UserError` early for an impossible run, before minutes of data preparation.

    It starts from the weights of `parent`, if given.
    """
    if parent is None:
        check_has_base(config)
    check_trains(config)
    if out is not None:
        check_free(out)
    if config.training.tensorboard:
        TensorBoard.check()
    choose_precision(choose_device(config.training.device), config.training.precision)
    parallel_over(ranks, config.training.parallel).check(config.model, config.training)
    freeze_matching(model_without_storage(with_usual_vocabulary(config)), config.training.freeze)


def check_trains(config: RunConfig) -> None:
    """Raises `UserError` if the matrices of `config` cannot be trained, and no adapter is."""
    if config.model.weight_format.name != "fp32" and config.model.adapter.name == "none":
        raise UserError(
            f"weight_format {config.model.weight_format.name!r} has no matrices to train: leave it out, or fine-tune a "
            "compressed run with --adapter lora"
        )


def check_has_base(config: RunConfig) -> None:
    """Raises `UserError` if a run of `config` cannot start from new weights."""
    if config.model.adapter.name != "none":
        raise UserError(f"adapter {config.model.adapter.name!r} needs a base: name its run with --init-from")


def check_merges(run: Run) -> None:
    """Raises `UserError` if the adapter of `run` cannot become part of its weights."""
    adapter = run.config.model.adapter
    if not adapter.variant.merges:
        raise UserError(f"{run.path} has adapter {adapter.name!r}, which no weights can take in: give its base")


def check_fits_run(source: Run, config: RunConfig) -> None:
    """Raises `UserError` unless a run of `config` can start from the weights and the tokenizer of `source`."""
    check_merges(source)
    check_fits(source.config.model, config.model)
    if config.data.tokenizer != source.config.data.tokenizer:
        raise UserError(f"--init-from {source.path} determines the tokenizer: leave --tokenizer and its settings out")


def with_class_names(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """`config` with the `names` of its classes, if it has labelled data and there are any."""
    dataset = config.data.dataset
    if not names or dataset.variant is not Labels:
        return config
    named = replace(dataset, settings=replace(dataset.settings, classes=tuple(names)))
    return replace(config, data=replace(config.data, dataset=named))


def with_chat_template(config: RunConfig, source: Run) -> RunConfig:
    """`config`, whose conversations are written as `source` has learned them, unless it says otherwise itself."""
    dataset = config.data.dataset
    if dataset.variant is not Conversations:
        return config
    settings, template = dataset.settings, source.chat_template
    variables, tokens = published_names(source.path), published_special_tokens(source.path)
    others = {name: number for name, number in tokens.items() if source.tokenizer.special_tokens.get(name) != number}
    settings = replace(
        settings,
        chat_template=settings.chat_template or (template and template.source),
        template_variables=settings.template_variables or tuple(f"{name}={text}" for name, text in variables.items()),
        template_tokens=settings.template_tokens or tuple(f"{name}={number}" for name, number in others.items()),
    )
    return replace(config, data=replace(config.data, dataset=replace(dataset, settings=settings)))


def add_files(prepared: PreparedData, parent: Parent | None, run: Path) -> None:
    """Give the folder of a new run what its parent came with, and how its conversations are written."""
    inherit_originals(None if parent is None else Path(parent.path), run)
    if isinstance(prepared, PreparedConversations):
        files.write_text(run / CHAT, prepared.template.source)


def initial_model(source: Run, checkpoint: str, config: RunConfig) -> Model:
    """The model of `config` before its first step, with the weights of `source`.

    An adapter, and another head than that of `source`, are drawn by the seed.
    """
    if config.model.adapter.name != "none":
        return starting_model(config, source.checkpoint(checkpoint))
    model = in_full_precision(source.load_model(checkpoint))
    if config.model.topology == model.config.topology:
        return model
    torch.manual_seed(config.training.seed)
    new = build_model(config.model.base)
    new.load_state_dict({**new.state_dict(), **body_of(model)})
    return new.eval()


def body_of(model: Model) -> dict[str, Tensor]:
    """The weights of `model` but those of its heads."""
    return {name: x for name, x in model.state_dict().items() if name.partition(".")[0] not in HEADS}


def check_same_data(ranks: Ranks, prepared: PreparedData) -> None:
    """Raises `UserError` on all ranks unless their data is the same."""
    names = ranks.all(prepared.folder.name)
    if others := [str(rank) for rank, name in enumerate(names) if name != names[0]]:
        raise UserError(f"rank {', '.join(others)} has other data than rank 0: give every node the same files")


def begin_run(
    path: Path,
    config: RunConfig,
    prepared: PreparedData,
    machine: Resolved,
    parent: Parent | None = None,
    initial: Model | None = None,
) -> Run:
    """Create the folder of a new run of `config`, with known vocabulary; `initial` has the weights of its `parent`."""
    config = with_class_names(config, prepared.classes)
    if initial is not None and parent is not None and config.model.adapter.name != "none":
        initial.base = replace(parent, path=str(Path(parent.path).absolute()))
    tokenizers, text = (prepared.tokenizer, prepared.target_tokenizer), prepared.folder.name
    add = partial(add_files, prepared, parent)
    return Run.create(path, config, *tokenizers, text, machine, parent, initial, add, prepared.sources)
