"""Tracing a training step module by module, to find where its numbers stop being finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.training.norms import floats_in, json_number, tensors_in


@dataclass(frozen=True)
class NumberRange:
    """The range of the finite numbers in some tensors, and how many are not finite."""

    lowest: float
    highest: float
    nan: int
    infinite: int
    count: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> NumberRange:
        """The range of all `tensors` together."""
        flat = [tensor.detach().flatten().double() for tensor in tensors]
        numbers = torch.cat(flat) if flat else torch.empty(0)
        finite = numbers[numbers.isfinite()]
        lowest, highest = (finite.min().item(), finite.max().item()) if finite.numel() else (math.nan, math.nan)
        nan = int(numbers.isnan().sum())
        return cls(lowest, highest, nan, numbers.numel() - finite.numel() - nan, numbers.numel())

    @property
    def is_finite(self) -> bool:
        return not self.nan and not self.infinite

    def to_json(self) -> dict[str, float | str]:
        return {name: json_number(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        if not self.count:
            return "no numbers"
        parts = [] if math.isnan(self.lowest) else [f"{self.lowest:.4g} to {self.highest:.4g}"]
        parts += [f"{n} {what}" for n, what in ((self.nan, "NaN"), (self.infinite, "infinite")) if n]
        return f"{', '.join(parts)} ({self.count} numbers)"


@dataclass(frozen=True)
class Origin:
    """The module in which numbers stop being finite.

    In a forward pass, `results` are its outputs. In a backward pass, they are the gradients of its inputs or of its
    weights, and `gradients` are those of its outputs.
    """

    module: str
    kind: str
    micro_batch: int
    inputs: NumberRange
    weights: NumberRange
    results: NumberRange
    gradients: NumberRange | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            name: value.to_json() if isinstance(value, NumberRange) else value for name, value in vars(self).items()
        }


class Search:
    """Keeps the first origin whose numbers before were finite, or else the first one.

    The latter may have got its numbers from a function between two modules. Then the module around both, which ends
    later, is the former.
    """

    def __init__(self) -> None:
        self.origin: Origin | None = None
        self._is_source = False

    def offer(self, origin: Origin, *, is_source: bool) -> None:
        if self.origin is None or (is_source and not self._is_source):
            self.origin, self._is_source = origin, is_source


class Tracer:
    """Watches the modules of `model` by hooks, in the order in which they end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward, self.backward = Search(), Search()
        self._micro_batch = -1
        self._inputs: dict[str, NumberRange] = {}
        self._gradients: dict[str, list[Tensor]] = defaultdict(list)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Training steps inside are traced."""
        hooks = [self.model.register_forward_pre_hook(self._begin_micro_batch)]
        for name, module in self.model.named_modules():
            hooks += self._hooks(name or "model", module)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin_micro_batch(self, module: nn.Module, inputs: Any) -> None:
        self._micro_batch += 1

    def _hooks(self, name: str, module: nn.Module) -> list[Any]:
        def offer_gradient(gradient: Tensor) -> None:
            before = NumberRange.of(self._gradients[name])
            self._offer(self.backward, name, module, [gradient], before)

        def watched(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            alias = value.view_as(value)  # its gradient is that of this module alone
            alias.register_hook(offer_gradient)
            return alias

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return tuple(map(watched, args)), {key: watched(value) for key, value in kwargs.items()}

        def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inputs[name] = NumberRange.of(floats_in([args, kwargs]) or tensors_in([args, kwargs]))
            self._gradients[name] = []
            results = floats_in(output)
            self._offer(self.forward, name, module, results, self._inputs[name])
            for result in results:
                if result.requires_grad:
                    result.register_hook(self._gradients[name].append)

        weights = [weight for weight in module.parameters(recurse=False) if weight.requires_grad]
        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, with_kwargs=True),
            *(weight.register_hook(offer_gradient) for weight in weights),
        ]

    def _offer(
        self, search: Search, name: str, module: nn.Module, results: Sequence[Tensor], before: NumberRange
    ) -> None:
        if all(tensor.isfinite().all() for tensor in results):
            return
        weights = NumberRange.of(floats_in(list(module.parameters(recurse=False))))
        gradients = before if search is self.backward else None
        inputs = self._inputs.get(name, NumberRange.of([]))
        kind = type(module).__name__
        origin = Origin(name, kind, self._micro_batch, inputs, weights, NumberRange.of(results), gradients)
        # A module without numbers before has passed its input on, or was never called.
        search.offer(origin, is_source=before.is_finite and before.count > 0)
