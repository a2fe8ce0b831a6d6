"""One update of the weights, and one pass over the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minitransformer.training.experts import ExpertBalance
from minitransformer.training.light import LightOptimizer
from minitransformer.training.objectives import Objective, Score
from minitransformer.training.objectives.base import TrainingBatch
from minitransformer.training.precision import Precision
from minitransformer.training.probe import NO_PROBE, Probe


@dataclass(frozen=True)
class StepResult:
    """The mean loss in nats a target, the norm of its gradient before clipping, and whether both were finite.

    To read one of them is to wait for the device. `measured` is what a probe found out, if it looked.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    measured: Mapping[str, float | None] = field(default_factory=dict)


def training_step(
    model: nn.Module,
    objective: Objective,
    micro_batches: Sequence[TrainingBatch],
    optimizers: list[LightOptimizer],
    precision: Precision,
    *,
    grad_clip: float,
    balance: ExpertBalance,
    probe: Probe = NO_PROBE,
) -> StepResult:
    """Descend along the gradient of the mean loss over the targets of all micro-batches together.

    The sum over each micro-batch is divided by the number of targets in all of them, so that k micro-batches give what
    one batch would; experts are balanced beside it. If the loss or a gradient is infinite or NaN, the weights stay as
    they are.
    """
    counts = [batch.num_targets for batch in micro_batches]  # before they go to the device, which would be waited for
    targets = sum(counts)
    total = torch.zeros((), device=precision.device)
    for batch, count in zip(micro_batches, counts, strict=True):
        batch = batch.to(precision.device, non_blocking=True)
        with precision.autocast():
            loss = objective.loss_sum(model, batch) / targets
            total += loss.detach()
            loss = loss + balance.loss() * count / targets
        precision.backward(loss)
    precision.unscale(optimizers)
    probe.before_update()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = torch.isfinite(total + grad_norm)
    precision.update(optimizers, skip=(~finite).float())
    model.zero_grad(set_to_none=True)
    return StepResult(total, grad_norm, finite)


@dataclass(frozen=True)
class Validation:
    """Loss over a split: in nats a target, as perplexity, and in bits a byte of text, if the targets are one.

    `accuracy` is the share of targets that the model guessed, `exact` that of texts of which it guessed all,
    `blind_accuracy` what one guesses without looking. Where the whole split was read and other validations read a
    subset, `subset_loss` is the loss of that.
    """

    loss: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    exact: float | None = None
    blind_accuracy: float | None = None
    tokens: int = 0
    """that were read"""
    subset_loss: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def comparable_loss(self) -> float:
        """What other validations of the run may be compared with: the loss of what all of them read."""
        return self.loss if self.subset_loss is None else self.subset_loss

    def __str__(self) -> str:
        parts = [f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}"]
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.4f} bits per byte")
        if self.accuracy is not None:
            parts.append(f"{self.accuracy:.1%} right")
        if self.exact is not None:
            parts.append(f"{self.exact:.1%} exact")
        if self.blind_accuracy is not None:
            parts.append(f"{self.blind_accuracy:.1%} by a blind guess")
        return ", ".join(parts)


@dataclass(frozen=True)
class Subset:
    """Some of the batches of a validation split, the tokens in them, and the bytes of text that their targets are."""

    batches: Sequence[int]
    tokens: int
    bytes: int | None


@dataclass
class _Sums:
    """Over the batches that were scored."""

    nats: float = 0.0
    targets: int = 0
    tokens: int = 0
    correct: int | None = None
    exact: list[bool] = field(default_factory=list)

    def add(self, batch: TrainingBatch, score: Score) -> None:
        self.nats += float(score.nats.double())
        self.targets += batch.num_targets
        self.tokens += batch.num_tokens
        if score.correct is not None:
            self.correct = (self.correct or 0) + int(score.correct)
        if score.exact is not None:
            self.exact += score.exact.tolist()


@torch.no_grad()
def validate(
    model: nn.Module,
    objective: Objective,
    precision: Precision,
    subset: Subset | None = None,
    *,
    whole: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """The loss of every target of the validation split, each predicted once; of `subset` alone if not `whole`.

    Bits per byte, Σ nats / (ln 2 · bytes), compares models with different tokenizers. `advance` hears how many of how
    many batches are done.
    """
    was_training = model.training
    model.eval()
    batches, drawn = objective.validation_batches(), set(subset.batches if subset else ())
    chosen = range(len(batches)) if whole or subset is None else subset.batches
    sums, part = _Sums(), _Sums()
    for done, index in enumerate(chosen):
        advance(done, len(chosen))
        batch = batches.batch(index)
        with precision.autocast():
            score = objective.score(model, batch.to(precision.device))
        sums.add(batch, score)
        if index in drawn:
            part.add(batch, score)
    advance(len(chosen), len(chosen))
    model.train(was_training)
    size = objective.validation_bytes if whole or subset is None else subset.bytes
    return Validation(
        loss=sums.nats / sums.targets,
        bits_per_byte=None if size is None else sums.nats / (math.log(2) * size),
        accuracy=None if sums.correct is None else sums.correct / sums.targets,
        exact=sum(sums.exact) / len(sums.exact) if sums.exact else None,
        blind_accuracy=objective.blind_accuracy,
        tokens=sums.tokens,
        subset_loss=part.nats / part.targets if subset is not None and whole else None,
    )
