"""Fine-tuning: a run that starts from the weights of another one, its parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitransformer.errors import UserError
from minitransformer.models.adapters import Adapter
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_in_parts, weight_shapes
from minitransformer.settings import declared, flat
from minitransformer.text.datasets import PreparedData
from minitransformer.text.datasets.text import TooShort
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.config import RunConfig, TrainingConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.objectives import Classify
from minitransformer.training.optimizers import AdamW
from minitransformer.training.weights import load_base

# A tenth of the learning rates of pretraining preserves most of what was learned. 3e-4 becomes nanoGPT's 3e-5; runs
# trained by Muon are fine-tuned by Muon (Liu et al. 2025, arXiv 2502.16982, section 3.5).
SHARE_OF_RATES = 0.1
MOST_WARMUP_STEPS, MOST_STEPS, MOST_TOKENS = 20, 1000, 1024
LEAST_TOKENS = 8
"""minimum tokens per sequence; shorter texts are refused"""
WEIGHTLESS = {"dropout", "attention_kernel", "init"}
"""model settings that a fine-tune may change, because they do not change the outputs"""
OF_HEAD = {
    *("topology", "num_classes", "pooled", "pooling", "pooled_norm", "next_sentence"),
    *("head", "transform_bias", "head_bias", "logit_scale", "logit_softcap", "tied_embeddings"),
}
"""model settings of the heads, which a classifier that starts from another model does not take over"""


def fine_tuning(parent: RunConfig, *, from_scratch: bool, new_data: bool, adapter: str = "none") -> RunConfig:
    """The default configuration for fine-tuning `parent`, with an adapter called `adapter`.

    Learning rates are kept if the parent is itself a fine-tune of all weights, not trained `from_scratch`. With
    `new_data`, settings for reading the parent's data are reset, except those that the tokenizer depends on. The model
    of a run that trained an adapter is the one into which it is merged, and that of a compressed one is in full, unless
    an adapter is trained.
    """
    of_all_weights = parent.model.adapter.name == "none"
    training = _gentle(parent.training) if from_scratch or not of_all_weights else parent.training
    training = replace(training, freeze=(), teacher=None, teacher_sha256=None)
    if adapter != "none":
        training = _for_adapter(training, Adapter.named(adapter).learning_rate)
    keeps_format = adapter != "none" and of_all_weights
    parent = replace(parent, model=parent.model.base if keeps_format else parent.model.plain)
    cuts_text = parent.data.dataset.variant.cuts_text
    length = min(parent.sequence_length, MOST_TOKENS) if cuts_text else parent.model.context_length
    training = replace(training, sequence_length=None if length == parent.model.context_length else length)
    if not new_data:
        return replace(parent, training=training)
    old = parent.data
    reading = old.dataset.settings
    anew = {each.attribute: each.default for each in declared(type(reading)) if each.about.get("of_files")}
    dataset = replace(old.dataset, settings=replace(reading, **anew))
    return replace(parent, data=DataConfig(tokenizer=old.tokenizer, dataset=dataset), training=training)


def _gentle(training: TrainingConfig) -> TrainingConfig:
    rates = {name: getattr(training, name) for name in ("lr", "embedding_lr", "head_lr", "min_lr")}
    gentle: dict[str, Any] = {name: rate and float(f"{SHARE_OF_RATES * rate:.6g}") for name, rate in rates.items()}
    return replace(
        training,
        **gentle,
        warmup_steps=min(training.warmup_steps, MOST_WARMUP_STEPS),
        steps=min(training.steps, MOST_STEPS),
    )


def _for_adapter(training: TrainingConfig, learning_rate: float) -> TrainingConfig:
    """The optimizer and the rates of the adapter's paper, without weight decay, which would pull towards the base."""
    rates: dict[str, Any] = {"lr": learning_rate, "embedding_lr": None, "head_lr": None, "min_lr": 0.0}
    return replace(training, optimizer=AdamW.choose(), weight_decay=0.0, **rates)


def starting_model(config: RunConfig, base: Path) -> Model:
    """The model of `config` before its first step: an adapter, drawn by the seed, and the weights in its `base`."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.training.seed)
        model = build_in_parts(config.model)
        load_base(base, model)
        torch.manual_seed(config.training.seed)
        config.model.adapter.make().begin(model)
    return model


def check_fits(parent: ModelConfig, model: ModelConfig) -> None:
    """Raises `UserError` unless `model`, but for an adapter, can load the weights of `parent` and computes the same."""
    merges = parent.adapter.name != "none" or model.weight_format.name == "fp32"
    parent, model = parent.plain if merges else parent.base, model.base
    before, after = flat(parent), flat(model)
    new_head = parent.topology in Classify.classifier_of and model.topology == Classify.classifier_of[parent.topology]
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if old == new or name in WEIGHTLESS or (new_head and name in OF_HEAD):
            continue
        if name == "context_length" and weight_shapes(parent) == weight_shapes(model):
            continue
        remedy = (
            "give --sequence-length"
            if name == "context_length" and model.context_length < parent.context_length
            else "leave it out"
        )
        raise UserError(f"the run of --init-from has {name} {old}, not {new}: {remedy}, or train from scratch")


def prepare_fine_tuning(
    config: RunConfig, usual: RunConfig, tokenizers: Sequence[Tokenizer]
) -> tuple[RunConfig, PreparedData]:
    """The data of a fine-tune, encoded by its parent's `tokenizers`, and the adapted configuration.

    If the text is too short for sequences of the `usual` length, and none was requested, sequences are as long as
    it allows. Raises `UserError` for unusable data.
    """
    try:
        return config, config.prepare(tokenizers)
    except TooShort as error:
        if config.training.sequence_length != usual.training.sequence_length or error.longest < LEAST_TOKENS:
            raise
        config = replace(config, training=replace(config.training, sequence_length=error.longest))
    return config, config.prepare(tokenizers)
