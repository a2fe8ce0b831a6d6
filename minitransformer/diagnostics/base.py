"""The interface of instruments, and what they look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property

from jaxtyping import Bool
from torch import Tensor, nn

from minitransformer.diagnostics.passage import Loss, Passage, watch_a_pass
from minitransformer.registry import Registered

Figures = dict[str, Tensor]
"""Scalars by place: "stack.0" is a layer, "stack.0.attention" a sublayer, and "" the whole model."""


class Scene:
    """A model at rest, and the `instruments` that look at it; what they share is computed when it is first asked for.

    `loss` is the mean loss of a batch, `examples` are those of its examples one by one. `is_token` is False at padding
    of which the model is not told, by stack. `turn` counts the measurements of a training run; None is one that stands
    alone.
    """

    def __init__(
        self,
        model: nn.Module,
        instruments: Sequence[Instrument],
        loss: Loss,
        examples: Sequence[Loss],
        *,
        is_token: Mapping[str, Bool[Tensor, "batch length"]] | None = None,
        turn: int | None = None,
    ) -> None:
        self.model, self.instruments, self.loss, self.examples, self.turn = model, instruments, loss, examples, turn
        self._is_token = is_token or {}

    @cached_property
    def passage(self) -> Passage:
        """A forward pass of the batch, to which all instruments listen."""
        with ExitStack() as listening:
            for instrument in self.instruments:
                listening.enter_context(instrument.listen())
            return watch_a_pass(self.model, self.loss, self._is_token)


class Instrument(Registered, kind="instrument"):
    """One quantity of a model, measured at many places of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def listen(self) -> AbstractContextManager[object]:
        """Stands around the scene's pass, for who wants to hear more of it than a `Passage` holds."""
        return nullcontext()

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
