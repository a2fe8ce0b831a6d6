"""The interface of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from minitransformer.models.config import ModelConfig
from minitransformer.registry import Registered
from minitransformer.text.datasets import Dataset, PreparedData
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Score:
    """The loss of a batch in nats, summed over its targets; if it is asked, how many of them were predicted right.

    Where targets are whole texts, `exact` says of each [texts] whether all of it was predicted.
    """

    nats: Tensor
    correct: Tensor | None = None
    exact: Tensor | None = None


@dataclass(frozen=True)
class BatchKey:
    """Which batch this is: what is random in it depends on that alone."""

    seed: int
    index: int
    split: str

    def numbers(self, stream: int) -> list[int]:
        """A seed that no other batch has, of training or of validation, where objectives have streams of their own."""
        return [self.seed, self.index, stream + 2 * (self.split == "validation")]


class Objective(Registered, kind="objective"):
    """A loss over batches of one kind of data, and what it makes of a batch before that is learned from."""

    topologies: ClassVar[frozenset[str]]
    dataset: ClassVar[type[Dataset]]
    special_tokens: ClassVar[Sequence[str]] = ()
    """tokens that the vocabulary has beside those of the text"""
    fixed_shapes: ClassVar[bool] = True
    """whether all training batches have the same shapes"""
    predicts_text: ClassVar[bool] = True
    """whether its targets are the text, each token once, so that bits per byte have a meaning"""
    has_baseline: ClassVar[bool] = False
    """whether its accuracy is told beside that of the most frequent token"""
    whole_windows: ClassVar[bool] = False
    """whether it cannot learn from a window that is shorter than the others"""

    def __init__(self, settings: Any, tokenizer: Tokenizer, model: ModelConfig, sequence_length: int) -> None:
        self.settings, self.tokenizer, self.model, self.sequence_length = settings, tokenizer, model, sequence_length

    @property
    def window(self) -> int:
        """How many tokens of text a training sequence holds."""
        return self.sequence_length

    def make_batch(self, batch: Any, data: PreparedData, key: BatchKey) -> Any:
        """What is learned from `batch` of `data`."""
        return batch

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """What training makes small: in nats, summed over the targets of `batch` that count."""
        return self.score(model, batch).nats

    def score(self, model: nn.Module, batch: Any) -> Score:
        """How well `model` predicts the targets of `batch`."""
        raise NotImplementedError

    def examples(self, data: PreparedData, batch: Any, count: int) -> list[list[int]]:
        """Some inputs, of which a sample shows what the model makes; `batch` is the first of validation or training."""
        return []


def torch_seed(numbers: Sequence[int]) -> int:
    """A seed for torch made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
