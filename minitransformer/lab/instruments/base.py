"""The interface of instruments, and what they look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from torch import Tensor, nn

from minitransformer.lab.instruments.passage import Loss, Passage, watch_a_pass
from minitransformer.registry import Registered

Figures = dict[str, Tensor]
"""Scalars by place: "stack.0" is a layer, "stack.0.attention" a sublayer, and "" the whole model."""


class Scene:
    """A model at rest, and what to look at it with; what instruments share is computed when it is first asked for.

    `loss` is the mean loss of a batch, `examples` are those of its examples one by one.
    """

    def __init__(self, model: nn.Module, loss: Loss, examples: Sequence[Loss]) -> None:
        self.model, self.loss, self.examples = model, loss, examples

    @cached_property
    def passage(self) -> Passage:
        """A forward pass of the batch."""
        return watch_a_pass(self.model, self.loss)


class Instrument(Registered, kind="instrument"):
    """One quantity of a model, measured at many places of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def look(self, scene: Scene) -> Figures:
        """The figures of the model at rest, which is left as it was."""
        raise NotImplementedError


class StepInstrument(Instrument):
    """An instrument that reads its figures off a training step as it happens, and needs no passes of its own there."""

    def look(self, scene: Scene) -> Figures:
        return {}  # nothing to be seen without a step

    def hear(self, grad_norm: float) -> None:
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
