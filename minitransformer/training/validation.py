"""How good a model is on the validation split, how much of that is read how often, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from minitransformer.evaluation.metrics import Metric, Totals, values_of
from minitransformer.text.batches import IGNORE
from minitransformer.text.token_files import count_bytes
from minitransformer.training.config import RunConfig
from minitransformer.training.loader import Loader
from minitransformer.training.logging import Log
from minitransformer.training.precision import Precision

SHARE = 10
"""validation reads this part of the tokens that are trained on in between, unless it is told how many"""
LEAST = 8192
"""tokens, as fewer say too little"""
FASTER = 3
"""than a training step is a validation of as many tokens, about: it has no backward pass"""


@dataclass(frozen=True)
class Validation:
    """The metrics of a model on a split, by name; None for those that say nothing of it.

    Where the whole split was read and other validations read a subset, `subset_loss` is the loss of that.
    """

    values: Mapping[str, float | None]
    tokens: int = 0
    """that were read"""
    subset_loss: float | None = None

    @property
    def loss(self) -> float:
        """Nats a target."""
        loss = self.values["validation_loss"]
        assert loss is not None
        return loss

    @property
    def comparable_loss(self) -> float:
        """What other validations of the run may be compared with: the loss of what all of them read."""
        return self.loss if self.subset_loss is None else self.subset_loss

    def record(self) -> dict[str, float | None]:
        """Its numbers, as `metrics.jsonl` has them."""
        return {**self.values, "validation_tokens": self.tokens}

    def __str__(self) -> str:
        known = {name: value for name, value in self.values.items() if value is not None}
        return ", ".join(Metric.named(name).in_words.format(value) for name, value in known.items())


@dataclass(frozen=True)
class Subset:
    """Some of the batches of a validation split, the tokens in them, and the bytes of text that their targets are."""

    batches: Sequence[int]
    tokens: int
    bytes: int | None


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    subset: Subset | None = None,
    *,
    whole: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """The metrics over every target of the validation split, each predicted once; of `subset` alone if not `whole`.

    `advance` hears how many of how many batches are done.
    """
    was_training = model.training
    model.eval()
    batches, drawn = loader.validation_batches(), set(subset.batches if subset else ())
    chosen = range(len(batches)) if whole or subset is None else subset.batches
    totals, part = Totals(majority_baseline=loader.majority_baseline), Totals()
    totals.bytes = loader.validation_bytes if whole or subset is None else subset.bytes
    for done, index in enumerate(chosen):
        advance(done, len(chosen))
        batch = batches.batch(index)
        with precision.autocast():
            score = loader.objective.score(model, batch.to(precision.device))
        totals.add(batch, score)
        if index in drawn:
            part.add(batch, score)
    advance(len(chosen), len(chosen))
    model.train(was_training)
    subset_loss = part.nats / part.targets if subset is not None and whole else None
    return Validation(values_of(totals), totals.tokens, subset_loss)


def most_tokens(config: RunConfig) -> int | None:
    """About how many tokens a validation reads that is not the last one; None for all."""
    training = config.training
    if training.validation_tokens is not None:
        return training.validation_tokens or None
    return max(LEAST, training.eval_every * config.tokens_per_step // SHARE)


def draw_subset(config: RunConfig, loader: Loader) -> Subset | None:
    """What every validation of a run reads, at least: one batch of each of equal parts, drawn by the run's seed.

    It is the same for the same configuration. None if that is the whole split.
    """
    batches = loader.validation_batches()
    most, count = most_tokens(config), len(batches)
    if most is None or most >= loader.validation_tokens:
        return None
    wanted = -(-most * count // loader.validation_tokens)
    ends = np.linspace(0, count, wanted + 1).astype(int)
    drawn = np.random.default_rng([config.training.seed, 5]).integers(ends[:-1], ends[1:]).tolist()
    if wanted >= count:
        return None
    read = [batches.batch(index) for index in drawn]
    return Subset(drawn, sum(batch.num_tokens for batch in read), _bytes(loader, read))


def _bytes(loader: Loader, batches: Sequence[Any]) -> int | None:
    """Of the text that the targets are; None if they are none."""
    size = loader.validation_bytes
    if size is None:
        return None
    count = partial(count_bytes, loader.data.target_tokenizer)
    drawn = np.concatenate([batch.targets[batch.targets != IGNORE].numpy() for batch in batches]).astype(np.uint32)
    # A published tokenizer may change a text, so that its tokens are not as many bytes.
    return round(size * count(drawn) / count(loader.validation_targets))


class Validator:
    """Reads a subset of the validation split, or all of it, and remembers how long a token takes."""

    def __init__(self, model: nn.Module, config: RunConfig, loader: Loader, precision: Precision, log: Log) -> None:
        self.subset = draw_subset(config, loader)
        self.tokens = loader.validation_tokens
        self._validate = partial(validate, model, loader, precision, self.subset, advance=log.validating)
        self._seconds_per_token: float | None = None

    def __call__(self, *, whole: bool) -> Validation:
        start = time.perf_counter()
        validation = self._validate(whole=whole)
        self._seconds_per_token = (time.perf_counter() - start) / validation.tokens
        return validation

    def seconds_left(self, step: int, config: RunConfig, tokens_per_second: float) -> float:
        """Of the validations from `step` on, with those after that step; known before the first from training."""
        training = config.training
        more = (training.steps - 1) // training.eval_every - (step - 1) // training.eval_every
        tokens = more * (self.tokens if self.subset is None else self.subset.tokens) + self.tokens
        return tokens * (self._seconds_per_token or 1 / (FASTER * tokens_per_second))

    def __str__(self) -> str:
        """A line to print; "" where all is read each time."""
        if self.subset is None:
            return ""
        return f"validation {self.tokens:,} tokens, of which {self.subset.tokens:,} at each validation, all at the end"
