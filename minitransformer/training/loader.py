"""Training and validation batches of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from minitransformer.text.batches import Batches, MadeBatches, TrainingBatch
from minitransformer.text.datasets import BatchShape, PreparedData
from minitransformer.text.token_files import TokenSource
from minitransformer.training.config import RunConfig
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import BatchKey


class Loader:
    """Batches of prepared data, transformed by the objective; each depends on the seed and its index alone.

    Validation reads the split `held_out`, which is "train" where all of the data is for an evaluation.
    """

    def __init__(
        self, data: PreparedData, objective: Objective, shape: BatchShape, seed: int, held_out: str = "validation"
    ) -> None:
        self.data, self.objective, self.shape, self.seed = data, objective, shape, seed
        self.held_out = held_out

    @classmethod
    def of_run(
        cls, config: RunConfig, data: PreparedData, held_out: str = "validation", stride: int | None = None
    ) -> Loader:
        """The loader for the run of `config`; validation windows begin `stride` tokens apart, by default adjacent."""
        objective = config.training.objective.make(data.tokenizer, config.model, config.sequence_length)
        shape = config.batch_shape(objective.window, whole=objective.whole_windows)
        return cls(data, objective, replace(shape, stride=stride), config.training.seed, held_out)

    def training_batches(self, step: int) -> Sequence[TrainingBatch]:
        """The micro-batches of a step, deterministically."""
        make = partial(self._made, index=step, split="train")
        batches: Sequence[TrainingBatch] = self.data.shuffled_batches(self.shape, self.seed, step, make)
        return batches

    def validation_batches(self) -> Batches:
        """The whole validation split, once."""
        batches = self.data.ordered_batches(self.held_out, self.shape)
        return MadeBatches(batches, partial(self._made, split="validation"))

    def _made(self, batch: Any, index: int, split: str) -> Any:
        return self.objective.make_batch(batch, self.data, BatchKey(self.seed, index, split))

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.validation_tokens > 0

    @property
    def validation_tokens(self) -> int:
        """Number of tokens in the validation split."""
        return self.data.num_tokens(self.held_out)

    @property
    def validation_targets(self) -> TokenSource:
        """The target ids that `validation_bytes` counts."""
        return self.data.targets(self.held_out)

    @cached_property
    def validation_bytes(self) -> int | None:
        """Bytes of text in the validation targets; None if they are not a whole text."""
        return self.data.num_bytes(self.held_out) if self.objective.predicts_text else None

    @property
    def majority_baseline(self) -> float | None:
        """Accuracy of always predicting the most frequent training token; None if accuracy is not measured."""
        measured = self.objective.has_baseline and self.held_out == "validation"
        return self.data.majority_baseline if measured else None

    def examples(self, count: int) -> list[list[int]]:
        """Some validation (or else training) inputs to generate samples from."""
        batch = next(iter(self.validation_batches() if self.validates else self.training_batches(0)))
        return self.objective.examples(self.data, batch, count)
