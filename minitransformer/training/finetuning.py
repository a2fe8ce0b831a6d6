"""Fine-tuning: a run that starts from the weights of another one, its parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import weight_shapes
from minitransformer.records import whole_record
from minitransformer.settings import declared, flat
from minitransformer.text.datasets import PreparedData
from minitransformer.text.datasets.text import TooShort
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import weights_digest
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.objectives import Classify

# A tenth of the learning rates of pretraining preserves most of what was learned. 3e-4 becomes nanoGPT's 3e-5; runs
# trained by Muon are fine-tuned by Muon (Liu et al. 2025, arXiv 2502.16982, section 3.5).
SHARE_OF_RATES = 0.1
MOST_WARMUP_STEPS, MOST_STEPS, MOST_TOKENS = 20, 1000, 1024
LEAST_TOKENS = 8
"""minimum tokens per sequence; shorter texts are refused"""
WEIGHTLESS = {"dropout", "attention_kernel", "init"}
"""model settings that a fine-tune may change, because they do not change the outputs"""


OF_HEAD = {
    *("topology", "num_classes", "pooled", "pooling", "next_sentence"),
    *("head", "head_bias", "logit_scale", "logit_softcap", "tied_embeddings"),
}
"""model settings of the heads, which a classifier that starts from another model does not take over"""


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run started from."""

    path: str
    checkpoint: str
    sha256: str
    """SHA-256 of the weights file"""

    @classmethod
    def of(cls, run: Path, checkpoint: Path) -> Parent:
        """The parent for `checkpoint` of the run folder `run`."""
        return cls(str(run), checkpoint.name, weights_digest(checkpoint))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any, origin: str) -> Parent | None:
        """The parent in `record`, from the file `origin`; None for a run from scratch. Raises `StorageError`."""
        return None if record is None else whole_record(cls, record, "its parent", origin)


def fine_tuning(parent: RunConfig, *, from_scratch: bool, new_data: bool) -> RunConfig:
    """The default configuration for fine-tuning `parent`.

    Learning rates are kept if the parent is itself a fine-tune, not trained `from_scratch`. With
    `new_data`, settings for reading the parent's data are reset, except those that the tokenizer depends on.
    """
    training = _gentle(parent.training) if from_scratch else parent.training
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


def check_fits(parent: ModelConfig, model: ModelConfig) -> None:
    """Raises `UserError` unless `model` can load the weights of `parent` and computes the same."""
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
