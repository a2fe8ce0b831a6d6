"""Run several diagnostics, on a given model or during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.diagnostics.activations import Loss
from minitransformer.diagnostics.base import Diagnostic, DiagnosticContext, Figures, StepDiagnostic, at_rest
from minitransformer.errors import UserError
from minitransformer.models.model import Model
from minitransformer.text.batches import IGNORE
from minitransformer.text.pair_batches import PairBatch
from minitransformer.training.config import RunConfig, TrainingConfig
from minitransformer.training.loader import Loader
from minitransformer.training.probe import NO_PROBE, Probe


def probe(
    model: nn.Module, loss: Loss, names: Sequence[str], *, examples: Sequence[Loss] = ()
) -> dict[str, float | None]:
    """The figures of the diagnostics `names` on `model`, which is not changed: {"stream-variance/stack.0": …}.

    `loss` is a forward pass on a batch that returns the mean loss, `lambda: objective_of(model(tokens))`; `examples`
    are such passes on single examples, by default the whole batch. An infinite or NaN figure is None,
    as in JSON. Diagnostics that need a training step, such as update-ratio, are omitted.
    Raises `UserError` for an unknown name, with the nearest.
    """
    diagnostics = [Diagnostic.named(name)(model) for name in names]
    return measure_at_rest(DiagnosticContext(model, diagnostics, loss, examples or [loss]))


def measure_at_rest(context: DiagnosticContext) -> dict[str, float | None]:
    """The figures of all diagnostics in eval mode, by name and location."""
    with at_rest(context.model):
        return readings({diagnostic.name: diagnostic.measure(context) for diagnostic in context.diagnostics})


def readings(figures: dict[str, Figures]) -> dict[str, float | None]:
    """Flat JSON numbers: "gradient-norm/stack.0.attention", or "gradient-spikes" for the whole model."""
    flat = {
        "/".join(filter(None, (name, place))): value for name, some in figures.items() for place, value in some.items()
    }
    if not flat:
        return {}
    # Synchronise with the device once, not for each number.
    numbers = torch.stack([value.detach().double() for value in flat.values()]).tolist()
    return {key: number if math.isfinite(number) else None for key, number in zip(flat, numbers, strict=True)}


def check_probe(config: RunConfig) -> None:
    """Raises `UserError` for unknown diagnostics in `probe`, or a model without transformer blocks."""
    for name in config.training.probe:
        Diagnostic.named(name)
    if config.training.probe and config.model.topology == "rnn":
        raise UserError("diagnostics need transformer blocks, and topology 'rnn' has none: leave --probe out")


class TrainingProbe(Probe):
    """Runs diagnostics in training step 1 and in every step that is a multiple of `every`.

    Diagnostics that need forward passes run before the step, with the weights of its loss and gradient, in
    float32, without dropout and `torch.compile`, on the same few examples each time: an eighth of the first
    micro-batch of the run, at least one. So a measured step takes at most about twice as long.
    """

    share = 1 / 8

    def __init__(
        self, model: nn.Module, loader: Loader, device: torch.device, names: Sequence[str], every: int
    ) -> None:
        self.every, self._due = every, False
        diagnostics = [Diagnostic.named(name)(model) for name in names]
        self._of_step = [one for one in diagnostics if isinstance(one, StepDiagnostic)]
        self._at_rest = [one for one in diagnostics if not isinstance(one, StepDiagnostic)]
        self._figures: dict[str, float | None] = {}
        self._model, self._loader, self._device = model, loader, device

    def before_step(self, step: int) -> None:
        self._due = step == 1 or step % self.every == 0
        if self._due and self._at_rest:
            loss, examples, is_token = self._passes
            turn = step // self.every
            context = DiagnosticContext(self._model, self._at_rest, loss, examples, is_token=is_token, turn=turn)
            self._figures = measure_at_rest(context)

    def before_update(self) -> None:
        if self._due:
            for diagnostic in self._of_step:
                diagnostic.before_update()

    def after_update(self, grad_norm: Tensor) -> dict[str, float | None]:
        for diagnostic in self._of_step:
            diagnostic.after_backward(float(grad_norm))
        if not self._due:
            return {}
        figures = {diagnostic.name: diagnostic.after_update() for diagnostic in self._of_step}
        return {f"probe/{key}": value for key, value in {**self._figures, **readings(figures)}.items()}

    @cached_property
    def _passes(self) -> tuple[Loss, list[Loss], dict[str, Tensor]]:
        """The losses of the batch and of single examples, and the padding masks that a decoder does not receive."""
        first: Any = self._loader.training_batches(0)[0].to(self._device)
        rows = first.split(1)
        count = max(1, int(self.share * len(rows)))
        batch = first.split(count)[0]
        is_token = {"decoder": batch.targets != IGNORE} if isinstance(batch, PairBatch) else {}
        return partial(self._loss, batch), [partial(self._loss, row) for row in rows[:count]], is_token

    def _loss(self, batch: Any) -> Tensor:
        return self._loader.objective.loss_sum(self._model, batch) / batch.num_targets


def probe_for(config: TrainingConfig) -> Callable[[Model, Loader, torch.device], Probe]:
    """A factory of the probe in `config`, for the trainer."""
    if not config.probe:
        return lambda *_: NO_PROBE
    return partial(TrainingProbe, names=config.probe, every=config.probe_every)
