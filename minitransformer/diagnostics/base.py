"""The interface of diagnostics, and their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property

from jaxtyping import Bool
from torch import Tensor, nn

from minitransformer.diagnostics.activations import ActivationRecord, Loss, record_forward_pass
from minitransformer.registry import Registered

Figures = dict[str, Tensor]
"""Scalars by location: "stack.0" is a layer, "stack.0.attention" a sublayer, and "" the whole model."""


class DiagnosticContext:
    """A model in eval mode and its `diagnostics`; shared results are computed once, on demand.

    `loss` is the mean loss of a batch, `examples` are those of its single examples. `is_token`, by stack, is False at
    padding for stacks without a mask. `turn` counts the measurements of a training run; None is a single measurement.
    """

    def __init__(
        self,
        model: nn.Module,
        diagnostics: Sequence[Diagnostic],
        loss: Loss,
        examples: Sequence[Loss],
        *,
        is_token: Mapping[str, Bool[Tensor, "batch length"]] | None = None,
        turn: int | None = None,
    ) -> None:
        self.model, self.diagnostics, self.loss, self.examples, self.turn = model, diagnostics, loss, examples, turn
        self._is_token = is_token or {}

    @cached_property
    def record(self) -> ActivationRecord:
        """The activations of a forward pass on the batch, with the hooks of all diagnostics."""
        with ExitStack() as hooks:
            for diagnostic in self.diagnostics:
                hooks.enter_context(diagnostic.hooks())
            return record_forward_pass(self.model, self.loss, self._is_token)


class Diagnostic(Registered, kind="diagnostic"):
    """A quantity measured at many locations of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def hooks(self) -> AbstractContextManager[object]:
        """Hooks around the forward pass, for quantities that are not in an `ActivationRecord`."""
        return nullcontext()

    def measure(self, context: DiagnosticContext) -> Figures:
        """The figures of the model, which is not changed."""
        raise NotImplementedError


class StepDiagnostic(Diagnostic):
    """A diagnostic of a training step, without forward passes of its own."""

    def measure(self, context: DiagnosticContext) -> Figures:
        return {}  # undefined without a training step

    def after_backward(self, grad_norm: float) -> None:
        """Called after every backward pass with the gradient norm before clipping."""

    def before_update(self) -> None:
        """Called in a measured step with complete, unclipped gradients, before the weights change."""

    def after_update(self) -> Figures:
        """The figures of the step, after the weights have changed."""
        raise NotImplementedError


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within it, `model` is in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
