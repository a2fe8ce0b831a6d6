"""The interface of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minitransformer.evaluation.class_report import class_items
from minitransformer.evaluation.items import Items
from minitransformer.models.config import ModelConfig
from minitransformer.registry import Registered
from minitransformer.text.batches import IGNORE, Batch, TrainingBatch
from minitransformer.text.datasets import Dataset, PreparedData
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Score:
    """The loss of each target of a batch in nats, 0 where there is none, and optionally whether the model is right.

    With `whole`, an item is an exact match if all of its targets are right. Where targets are classes, `probabilities`
    are those of each class.
    """

    nats: Float[Tensor, "*targets"]
    right: Bool[Tensor, "*targets"] | None = None
    whole: bool = False
    probabilities: Float[Tensor, "rows classes"] | None = None

    def items(self, batch: Any) -> Items:
        """What is counted of each item of `batch`, on whose targets it is."""
        targets = batch.targets.cpu()
        is_target = (targets != IGNORE).numpy()
        places, size = batch.item_numbers.cpu().numpy()[is_target], len(batch.item_tokens)
        # Added on a CPU, in one order, and in full precision.
        add = partial(np.bincount, places, minlength=size)
        columns: dict[str, Any] = {
            "nats": add(self.nats.cpu().double().numpy()[is_target]),
            "targets": add(),
            "tokens": batch.item_tokens.cpu().numpy(),
        }
        if self.probabilities is not None:
            of_classes = class_items(targets.numpy(), self.probabilities.cpu().double().numpy())
            return Items({**columns, **of_classes.columns}, of_classes.cells, of_classes.classes)
        if self.right is not None:
            columns["correct"] = add(self.right.cpu().numpy()[is_target]).astype(np.int64)
            if self.whole:
                columns["texts"] = np.ones(size, np.int64)
                columns["exact"] = (columns["correct"] == columns["targets"]).astype(np.int64)
        return Items(columns)


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
    distills: ClassVar[bool] = True
    """whether its loss is made from hidden states by a readout, and so may be that of a teacher's predictions"""
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
        return self.score(model, batch).nats.sum()

    def score(self, model: nn.Module, batch: Any) -> Score:
        """The evaluation of `model` on `batch`."""
        raise NotImplementedError

    def examples(self, data: PreparedData, batch: Any, count: int) -> list[list[int]]:
        """Some inputs to generate samples from; `batch` is the first of validation or training."""
        return []


def torch_seed(numbers: Sequence[int]) -> int:
    """A seed for torch, derived from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
