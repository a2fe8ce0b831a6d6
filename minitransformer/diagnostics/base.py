"""The interface of diagnostics, and what they are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property

from jaxtyping import Bool
from torch import Tensor, nn

from minitransformer.diagnostics.activations import ActivationRecord, Loss, record_forward_pass
from minitransformer.registry import Registered

Figures = dict[str, Tensor]
"""Scalars by place: "stack.0" is a layer, "stack.0.attention" a sublayer, and "" the whole model."""


class DiagnosticContext:
    """A model in eval mode, and the `diagnostics` that measure it; what they share is computed when first asked for.

    `loss` is the mean loss of a batch, `examples` are those of its examples one by one. `is_token` is False at padding
    of which the model is not told, by stack. `turn` counts the measurements of a training run; None is one that stands
    alone.
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
        """The activations of a forward pass of the batch, within the hooks of all diagnostics."""
        with ExitStack() as hooks:
            for diagnostic in self.diagnostics:
                hooks.enter_context(diagnostic.hooks())
            return record_forward_pass(self.model, self.loss, self._is_token)


class Diagnostic(Registered, kind="diagnostic"):
    """One quantity of a model, measured at many places of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def hooks(self) -> AbstractContextManager[object]:
        """Hooks around the forward pass, for what an `ActivationRecord` does not hold."""
        return nullcontext()

    def measure(self, context: DiagnosticContext) -> Figures:
        """The figures of the model, which is left as it was."""
        raise NotImplementedError


class StepDiagnostic(Diagnostic):
    """A diagnostic that measures a training step as it happens, and needs no passes of its own."""

    def measure(self, context: DiagnosticContext) -> Figures:
        return {}  # nothing to be seen without a step

    def after_backward(self, grad_norm: float) -> None:
        """After each step, measured or not: the norm of the whole gradient before clipping."""

    def before_update(self) -> None:
        """In a measured step: its gradients are complete and not clipped, its weights are still the old ones."""

    def after_update(self) -> Figures:
        """The figures of the step; its weights are the new ones now."""
        raise NotImplementedError


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within it, `model` evaluates: nothing is dropped, and no random number drawn."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
