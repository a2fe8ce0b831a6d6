"""Validation: metrics on the validation split or on a fixed subset of it, and the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from minitransformer.evaluation.intervals import Bounds
from minitransformer.evaluation.items import Totals
from minitransformer.evaluation.metrics import described_values, intervals_of, values_of
from minitransformer.text.batches import IGNORE
from minitransformer.text.token_files import count_bytes
from minitransformer.training.config import RunConfig
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from minitransformer.training.logging import Log
from minitransformer.training.precision import Precision
from minitransformer.training.ranks import ONE_PROCESS, Ranks
from minitransformer.training.signals import StopRequest

SHARE = 10
"""default tokens per validation, relative to the training tokens between validations"""
LEAST = 8192
"""minimum tokens per validation"""
FASTER = 3
"""approximate speed-up of validation over training per token: there is no backward pass"""


@dataclass(frozen=True)
class Validation:
    """The metrics of a model on a split, by name; None where a metric does not apply.

    If the whole split was read, `subset_loss` is the loss on the subset of the other validations.
    """

    values: Mapping[str, float | None]
    tokens: int = 0
    """tokens that were read"""
    subset_loss: float | None = None
    intervals: Mapping[str, Bounds] = field(default_factory=dict)
    """95% confidence intervals of metrics that have one"""

    @property
    def loss(self) -> float:
        """The loss in nats per target."""
        loss = self.values["validation_loss"]
        assert loss is not None
        return loss

    @property
    def comparable_loss(self) -> float:
        """The loss on the tokens that every validation of the run reads."""
        return self.loss if self.subset_loss is None else self.subset_loss

    def record(self) -> dict[str, float | None]:
        """The metrics, as in `metrics.jsonl`."""
        bounds: dict[str, float | None] = {}
        for name, (low, high) in self.intervals.items():
            bounds |= {f"{name}_low": low, f"{name}_high": high}
        return {**self.values, **bounds, "validation_tokens": self.tokens}

    def __str__(self) -> str:
        return ", ".join(described_values(self.values, self.intervals))


@dataclass(frozen=True)
class Subset:
    """Some batches of a validation split, their tokens, and the bytes of text in their targets."""

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
    ranks: Ranks = ONE_PROCESS,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """The metrics over every target of the validation split, or of `subset` if not `whole`; `ranks` share the batches.

    `advance` is called with the number of finished and of all batches, equally often on every rank.
    """
    was_training = model.training
    model.eval()
    batches, drawn = loader.validation_batches(), set(subset.batches if subset else ())
    chosen = range(len(batches)) if whole or subset is None else subset.batches
    totals, part = Totals(), Totals()
    for done in range(0, len(chosen), ranks.size):
        advance(done, len(chosen))
        # A rank without a batch in the last round repeats one: the model may have parts on all ranks.
        place = done + ranks.rank
        batch = batches.batch(index := chosen[min(place, len(chosen) - 1)])
        with precision.autocast():
            score = loader.objective.score(model, batch.to(precision.device))
        if place < len(chosen):
            totals.add(items := score.items(batch))
            if index in drawn:
                part.add(items)
    advance(len(chosen), len(chosen))
    model.train(was_training)
    classes = loader.objective.model.num_classes or 0
    totals, part = (over_ranks(each, ranks, classes) for each in (totals, part))
    totals.majority_baseline = loader.majority_baseline
    totals.bytes = loader.validation_bytes if whole or subset is None else subset.bytes
    subset_loss = part.nats / part.targets if subset is not None and whole else None
    values = values_of(totals)
    intervals = {name: bounds for name, bounds in intervals_of(totals).items() if name in values}
    return Validation(values, totals.tokens, subset_loss, intervals)


def over_ranks(totals: Totals, ranks: Ranks, classes: int) -> Totals:
    """The totals of the batches of all ranks; `classes` is 0 for targets that are tokens."""
    measured = ranks.any(totals.correct is not None)
    cells = np.zeros((classes, classes), np.int64) if totals.confusion is None else totals.confusion
    own = [totals.nats, totals.targets, totals.tokens, totals.correct or 0, totals.texts, totals.exact]
    nats, *counts = ranks.sum(torch.tensor([*own, *cells.ravel().tolist()], dtype=torch.float64)).tolist()
    targets, tokens, correct, texts, exact, *flat = map(int, counts)
    confusion = np.array(flat).reshape(cells.shape) if classes else None
    return Totals(nats, targets, tokens, correct if measured else None, texts, exact, confusion=confusion)


def most_tokens(config: RunConfig) -> int | None:
    """Approximate tokens per validation except the last; None for the whole split."""
    training = config.training
    if training.validation_tokens is not None:
        return training.validation_tokens or None
    return max(LEAST, training.eval_every * config.tokens_per_step // SHARE)


def draw_subset(config: RunConfig, loader: Loader) -> Subset | None:
    """The subset that every validation of a run reads: one random batch from each of equal parts of the split.

    It is the same for the same configuration. None if it is the whole split.
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
    """Bytes of text in the targets; None if the targets are not the text."""
    size = loader.validation_bytes
    if size is None:
        return None
    count = partial(count_bytes, loader.data.target_tokenizer)
    drawn = np.concatenate([batch.targets[batch.targets != IGNORE].numpy() for batch in batches]).astype(np.uint32)
    # A public tokenizer may normalise the text, which changes its number of bytes.
    return round(size * count(drawn) / count(loader.validation_targets))


class StoppedValidation(Exception):
    """A stop was requested during a validation, which is repeated when the run continues."""


class Validator:
    """Validates on a subset of the split or all of it, until a stop is requested, and records the time per token."""

    def __init__(self, learner: Learner, log: Log, stop: StopRequest) -> None:
        model, loader = learner.model, learner.loader
        self.subset = draw_subset(learner.config, loader)
        self.tokens = loader.validation_tokens
        self.log, self.stop, self.ranks = log, stop, learner.ranks
        self._validate = partial(
            validate, model, loader, learner.precision, self.subset, ranks=self.ranks, advance=self._advance
        )
        self._seconds_per_token: float | None = None

    def _advance(self, done: int, total: int) -> None:
        self.log.validating(done, total)
        if done < total and self.stop.agreed(self.ranks):
            raise StoppedValidation

    def __call__(self, *, whole: bool) -> Validation:
        """The metrics; raises `StoppedValidation`."""
        start = time.perf_counter()
        validation = self._validate(whole=whole)
        self._seconds_per_token = (time.perf_counter() - start) / validation.tokens
        return validation

    def seconds_left(self, step: int, config: RunConfig, tokens_per_second: float) -> float:
        """Seconds for the validations from `step` on; before the first one, estimated from training."""
        training = config.training
        more = (training.steps - 1) // training.eval_every - (step - 1) // training.eval_every
        tokens = more * (self.tokens if self.subset is None else self.subset.tokens) + self.tokens
        return tokens * (self._seconds_per_token or 1 / (FASTER * tokens_per_second))

    def __str__(self) -> str:
        """A line to print; "" if every validation reads the whole split."""
        if self.subset is None:
            return ""
        return f"validation {self.tokens:,} tokens, {self.subset.tokens:,} of them at each validation, all at the end"
