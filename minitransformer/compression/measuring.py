"""Size, quality and speed of a model, beside those of the one that it was made from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.decode import generate
from minitransformer.generation.fast.rows import with_row_kernel
from minitransformer.generation.weights import Float32
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import Model
from minitransformer.training.config import RunConfig
from minitransformer.training.loader import Loader
from minitransformer.training.validation import Subset, draw_subset
from minitransformer.training.weights import unique_tensors

ROUNDS, NEW_TOKENS, PROMPT = 5, 32, 8
"""decoded in turn with the other model"""
FIRST_TOKENS = 4
"""which take longer: the prompt is read, and a step recorded"""
RESAMPLES = 1000


@dataclass(frozen=True)
class ModelFigures:
    """What a model costs, and how good it is; None where it is not measured.

    `quality` is in bits per byte, or in nats per target where the targets are not the text, and has an interval;
    `change` is relative to the original, with its interval.
    """

    bytes: int
    parameters: int
    quality: float | None = None
    quality_low: float | None = None
    quality_high: float | None = None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    tokens_per_second: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stored_bytes(model: Model) -> int:
    """The bytes of its weights on disk."""
    return sum(tensor.nbytes for tensor in unique_tensors(model).values())


@dataclass(frozen=True)
class QualityData:
    """The batches that quality is measured on: those that every validation of the run reads."""

    loader: Loader
    batches: Sequence[int]
    tokens: int
    divisor: float
    """what their nats are divided by"""
    unit: str

    @classmethod
    def of(cls, config: RunConfig, loader: Loader) -> QualityData:
        every = loader.validation_batches()
        subset = draw_subset(config, loader) or Subset(
            range(len(every)), loader.validation_tokens, loader.validation_bytes
        )
        if subset.bytes is not None:
            return cls(loader, subset.batches, subset.tokens, math.log(2) * subset.bytes, "bits per byte")
        targets = sum(every.batch(index).num_targets for index in subset.batches)
        return cls(loader, subset.batches, subset.tokens, targets, "nats per target")

    @torch.no_grad()
    def nats(self, model: Model, advance: Callable[[], object]) -> np.ndarray:
        """The loss of `model` on each batch, in nats summed over its targets; `advance` is called after each."""
        every, nats = self.loader.validation_batches(), []
        for index in self.batches:
            nats.append(float(self.loader.objective.score(model, every.batch(index)).nats.double().sum()))
            advance()
        return np.array(nats)


def quality_figures(nats: np.ndarray, original: np.ndarray, divisor: float) -> dict[str, float]:
    """The quality and its change, with 95% intervals of batches drawn again with replacement, the same for both.

    Efron 1979, "Bootstrap methods": percentiles, without the intervals for fewer than two batches.
    """
    found = {"quality": nats.sum() / divisor, "change": nats.sum() / original.sum() - 1}
    if len(nats) > 1:
        drawn = np.random.default_rng(0).integers(len(nats), size=(RESAMPLES, len(nats)))
        changes = nats[drawn].sum(1) / original[drawn].sum(1) - 1
        for name, values in (("quality", nats[drawn].sum(1) / divisor), ("change", changes)):
            found[f"{name}_low"], found[f"{name}_high"] = np.quantile(values, (0.025, 0.975))
    return {name: float(value) for name, value in found.items()}


def decoding_speeds(models: Sequence[Model], report: Callable[[str], None]) -> list[float | None]:
    """Tokens per second of one greedy text by each model, in turn: medians; None for models that do not continue texts.

    The `FIRST_TOKENS` are not measured. `report` is called with what is said about kernels.
    """
    if not all(isinstance(model, DecoderLM) for model in models):
        return [None] * len(models)
    fast: list[Any] = [with_row_kernel(Float32.applied(model), report) for model in models]
    room = models[0].config.text_length
    prompt, new = [0] * min(PROMPT, max(1, room // 2)), min(NEW_TOKENS, max(1, room // 2))
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS + 1):
        for model, taken in zip(fast, seconds, strict=True):
            steps = generate(model, prompt, sampling)
            for _ in range(min(FIRST_TOKENS, new // 2)):
                next(steps)
            start = time.perf_counter()
            count = sum(1 for _ in steps)
            taken.append((time.perf_counter() - start) / count)
    return [1 / median(taken[1:]) for taken in seconds]


def figures_of(
    models: Mapping[str, Model],
    held_out: QualityData | None,
    report: Callable[[str], None],
    advance: Callable[[], object],
) -> dict[str, ModelFigures]:
    """The figures of each model; the first is the original. Quality is measured if there is data for it."""
    speeds = decoding_speeds(list(models.values()), report)
    found: dict[str, dict[str, Any]] = {
        name: {"bytes": stored_bytes(model), "parameters": model.num_parameters(), "tokens_per_second": speed}
        for (name, model), speed in zip(models.items(), speeds, strict=True)
    }
    if held_out is not None:
        nats = {name: held_out.nats(model, advance) for name, model in models.items()}
        original = next(iter(nats.values()))
        for name, each in nats.items():
            found[name] |= quality_figures(each, original, held_out.divisor)
    return {name: ModelFigures(**values) for name, values in found.items()}
