"""The norms of weights, gradients and activations in one training step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.training.probe import Probe
from minitransformer.training.ranks import Ranks
from minitransformer.training.shards import whole_tensor


class Norms(Probe):
    """A probe of one step: the norm of each parameter, of its gradient, and of the outputs of each module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._gradients: dict[str, float] = {}
        self._squares: dict[str, float] = defaultdict(float)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Training steps inside are recorded; a compiled model runs uncompiled."""
        hooks = [
            module.register_forward_hook(lambda _, __, output, name=name: self._note(name, output))
            for name, module in self.model.named_modules()
        ]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, output: Any) -> None:
        for tensor in floats_in(output):
            self._squares[name] += tensor.detach().double().square().sum().item()

    def before_update(self) -> None:
        named = self.model.named_parameters()
        self._gradients = {name: _norm(weight.grad) for name, weight in named if weight.grad is not None}

    def to_json(self, ranks: Ranks) -> dict[str, dict[str, float | str]]:
        """The norms by name, of the activations of all `ranks`; those that are not finite as text."""
        weights = {name: _norm(weight) for name, weight in self.model.named_parameters()}
        names = [name for name, _ in self.model.named_modules()]
        squares = ranks.sum(torch.tensor([self._squares[name] for name in names], dtype=torch.float64)).tolist()
        activations = {name or "model": math.sqrt(square) for name, square in zip(names, squares, strict=True)}
        parts = {"weights": weights, "gradients": self._gradients, "activations": activations}
        return {part: {name: json_number(norm) for name, norm in norms.items()} for part, norms in parts.items()}


def _norm(tensor: Tensor) -> float:
    return whole_tensor(tensor.detach()).double().norm().item()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def floats_in(value: Any) -> list[Tensor]:
    """The floating-point tensors among `tensors_in`."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def json_number(value: float) -> float | str:
    """`value` for JSON, which has no infinity or NaN."""
    return value if math.isfinite(value) else str(value)
