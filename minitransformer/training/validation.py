"""How much of the validation split is read how often, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from minitransformer.text.batches import IGNORE
from minitransformer.text.token_files import count_bytes
from minitransformer.training.config import RunConfig
from minitransformer.training.logging import Log
from minitransformer.training.objectives import Objective
from minitransformer.training.precision import Precision
from minitransformer.training.step import Subset, Validation, validate

SHARE = 10
"""validation reads this part of the tokens that are trained on in between, unless it is told how many"""
LEAST = 8192
"""tokens, as fewer say too little"""
FASTER = 3
"""than a training step is a validation of as many tokens, about: it has no backward pass"""


def most_tokens(config: RunConfig) -> int | None:
    """About how many tokens a validation reads that is not the last one; None for all."""
    training = config.training
    if training.validation_tokens is not None:
        return training.validation_tokens or None
    objective = Objective.named(training.objective)
    return max(LEAST, training.eval_every * objective.tokens_per_step(config) // SHARE)


def draw_subset(objective: Objective) -> Subset | None:
    """What every validation of a run reads, at least: one batch of each of equal parts, drawn by the run's seed.

    It is the same for the same configuration. None if that is the whole split.
    """
    config, batches = objective.config, objective.validation_batches()
    most, count = most_tokens(config), len(batches)
    if most is None or most >= objective.validation_tokens:
        return None
    wanted = -(-most * count // objective.validation_tokens)
    ends = np.linspace(0, count, wanted + 1).astype(int)
    drawn = np.random.default_rng([config.training.seed, 5]).integers(ends[:-1], ends[1:]).tolist()
    if wanted >= count:
        return None
    read = [batches.batch(index) for index in drawn]
    return Subset(drawn, sum(batch.num_tokens for batch in read), _bytes(objective, read))


def _bytes(objective: Objective, batches: Sequence[Any]) -> int | None:
    """Of the text that the targets are; None if they are none."""
    size = objective.validation_bytes
    if size is None:
        return None
    count = partial(count_bytes, objective.prepared.target_tokenizer)
    drawn = np.concatenate([batch.targets[batch.targets != IGNORE].numpy() for batch in batches]).astype(np.uint32)
    # A published tokenizer may change a text, so that its tokens are not as many bytes.
    return round(size * count(drawn) / count(objective.validation_targets))


class Validator:
    """Reads a subset of the validation split, or all of it, and remembers how long a token takes."""

    def __init__(self, model: nn.Module, objective: Objective, precision: Precision, log: Log) -> None:
        self.subset = draw_subset(objective)
        self.tokens = objective.validation_tokens
        self._validate = partial(validate, model, objective, precision, self.subset, advance=log.validating)
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
