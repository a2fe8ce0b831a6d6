"""Predicting the next token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from minitransformer.text.batches import Batch, SequentialWindows, ShuffledWindows
from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets.text import PreparedText, TextPreparation
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives.base import Objective, Score, refuse_other_files
from minitransformer.training.objectives.cross_entropy import summed_loss

if TYPE_CHECKING:
    from minitransformer.training.config import RunConfig


def prepare_text(
    config: RunConfig, tokenizers: Sequence[Tokenizer], special_tokens: Sequence[str] = ()
) -> PreparedText:
    """The text that `config` names, as token ids."""
    data = config.data
    refuse_other_files(data, ("target_data", "validation_target_data"))
    return TextPreparation(
        open_corpus(data.data, data.field),
        tokenizers[0] if tokenizers else data.tokenizer,
        vocab_size=config.model.vocab_size,
        validation=None if data.validation_data is None else open_corpus(data.validation_data, data.field),
        validation_fraction=data.validation_fraction,
        context_length=config.sequence_length,
        special_tokens=special_tokens,
    ).run()


class Causal(Objective, name="causal"):
    """−Σ log p(token | tokens before it). Bengio et al. 2003, section 2; Radford et al. 2018, equation 1."""

    topologies = frozenset({"decoder"})
    prepared: PreparedText

    @classmethod
    def prepare(cls, config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> PreparedText:
        return prepare_text(config, tokenizers)

    def training_batches(self, step: int) -> list[Batch]:
        training = self.config.training
        rows = training.batch_size * training.grad_accumulation
        windows = ShuffledWindows(self.prepared.train, self.config.sequence_length, rows, training.seed)
        return windows.batch(step).split(training.batch_size)

    def validation_batches(self) -> SequentialWindows:
        return SequentialWindows(self.prepared.validation, self.config.sequence_length, self.config.training.batch_size)

    @property
    def validation_bytes(self) -> int:
        return self.prepared.validation_bytes

    def score(self, model: nn.Module, batch: Batch) -> Score:
        return Score(model(batch.inputs, readout=partial(summed_loss, targets=batch.targets)))
