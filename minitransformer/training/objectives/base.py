"""The interface of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from minitransformer.models.config import ModelConfig
from minitransformer.registry import Registered
from minitransformer.text.batches import Batch, TrainingBatch
from minitransformer.text.datasets import Dataset, PreparedData
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Score:
    """The loss of a batch in nats, summed over its targets, and optionally the number of correct predictions.

    Where targets are whole texts, `exact` [texts] says whether each is an exact match. Where they are
    classes, `confusion` [classes, predicted classes] counts texts.
    """

    nats: Tensor
    correct: Tensor | None = None
    exact: Tensor | None = None
    confusion: Tensor | None = None


@dataclass(frozen=True)
class BatchKey:
    """Identifies a batch; its randomness depends on this key alone."""

    seed: int
    index: int
    split: str

    def numbers(self, stream: int) -> list[int]:
        """A unique random seed of this batch, for the random `stream` of an objective."""
        return [self.seed, self.index, stream + 2 * (self.split == "validation")]


class Objective(Registered, kind="objective"):
    """A loss over batches of one kind of data, and how it transforms them."""

    topologies: ClassVar[frozenset[str]]
    classifier_of: ClassVar[Mapping[str, str]] = {}
    """the topology that it trains in place of another one, with the same body and a new head"""
    dataset: ClassVar[type[Dataset]]
    batch_type: ClassVar[type[TrainingBatch]] = Batch
    """class of its training batches, a dataclass of tensors"""
    special_tokens: ClassVar[Sequence[str]] = ()
    """special tokens that it adds to the vocabulary"""
    fixed_shapes: ClassVar[bool] = True
    """whether all training batches have the same shapes"""
    predicts_text: ClassVar[bool] = True
    """whether its targets are every token of the text once, so that bits per byte is defined"""
    has_baseline: ClassVar[bool] = False
    """whether its accuracy is reported with the majority-class baseline"""
    whole_windows: ClassVar[bool] = False
    """whether it needs windows of full length"""

    def __init__(self, settings: Any, tokenizer: Tokenizer, model: ModelConfig, sequence_length: int) -> None:
        self.settings, self.tokenizer, self.model, self.sequence_length = settings, tokenizer, model, sequence_length

    @property
    def window(self) -> int:
        """Number of text tokens in a training sequence."""
        return self.sequence_length

    def make_batch(self, batch: Any, data: PreparedData, key: BatchKey) -> Any:
        """The training batch made from `batch` of `data`, such as with masks."""
        return batch

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss in nats, summed over the targets of `batch`."""
        return self.score(model, batch).nats

    def score(self, model: nn.Module, batch: Any) -> Score:
        """The evaluation of `model` on `batch`."""
        raise NotImplementedError

    def examples(self, data: PreparedData, batch: Any, count: int) -> list[list[int]]:
        """Some inputs to generate samples from; `batch` is the first of validation or training."""
        return []


def torch_seed(numbers: Sequence[int]) -> int:
    """A seed for torch, derived from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
