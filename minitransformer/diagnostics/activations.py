"""Activation records: the residual stream and the sublayer outputs of a forward pass, recorded by hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitransformer.architecture.block import Stack
from minitransformer.diagnostics.modules import layers_of, stacks_of, sublayers_of

Loss = Callable[[], Tensor]
"""A forward pass on a fixed batch that returns the mean loss, a scalar."""


@dataclass(frozen=True)
class StreamChange:
    """The residual stream before and after a layer ("stack.0") or a residual connection ("stack.0.attention").

    `before` and `after` are the placement's streams; `state` extracts x from one.
    """

    before: Any
    after: Any
    state: Callable[[Any], Tensor]
    is_token: Bool[Tensor, "batch length"] | None

    @property
    def x_before(self) -> Float[Tensor, "tokens d_model"]:
        """x before, without padding."""
        return self._tokens(self.before)

    @property
    def x_after(self) -> Float[Tensor, "tokens d_model"]:
        """x after, without padding."""
        return self._tokens(self.after)

    def _tokens(self, stream: Any) -> Tensor:
        x = self.state(stream)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.flatten(0, 1) if self.is_token is None else x[self.is_token]


@dataclass
class ActivationRecord:
    """The activations of a forward pass, by location."""

    loss: Tensor = field(default_factory=lambda: torch.tensor(torch.nan))
    layers: dict[str, StreamChange] = field(default_factory=dict)
    """in the order of execution"""
    connections: dict[str, StreamChange] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """sublayer outputs, before the residual connection"""
    is_token: dict[str, Tensor | None] = field(default_factory=dict)
    """by stack: False at padding; None without padding"""


def record_forward_pass(
    model: nn.Module, loss: Loss, is_token: Mapping[str, Bool[Tensor, "batch length"]] | None = None
) -> ActivationRecord:
    """Compute `loss` without gradients, and record the activations of every stack of `model`.

    `is_token`, by stack, is False at padding, for stacks that do not receive a mask.
    """
    record = ActivationRecord(is_token=dict(is_token or {}))
    handles = _add_hooks(model, record)
    try:
        with torch.no_grad():
            record.loss = loss()
    finally:
        for handle in handles:
            handle.remove()
    return record


def _add_hooks(model: nn.Module, record: ActivationRecord) -> list[RemovableHandle]:
    handles = [
        stack.register_forward_pre_hook(_record_tokens(name, record), with_kwargs=True)
        for name, stack in stacks_of(model).items()
    ]
    for place, block in layers_of(model).items():
        stack = place.rpartition(".")[0]
        note = _record_change(stack, stacks_of(model)[stack], record)
        handles.append(block.register_forward_hook(note(record.layers, place)))
        for connection in dict.fromkeys(branch.residual for branch in block.branches):
            inner = f"{place}.{connection.place.sublayer}"
            handles.append(connection.register_forward_hook(note(record.connections, inner)))
    for place, branch in sublayers_of(model).items():
        handles.append(branch.sublayer.register_forward_hook(_record_output(place, record)))
    return handles


def _record_tokens(stack: str, record: ActivationRecord) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        told = options.get("is_token")
        record.is_token[stack] = record.is_token.get(stack) if told is None else told

    return note


def _record_change(name: str, stack: Stack, record: ActivationRecord) -> Callable[[dict[str, StreamChange], str], Any]:
    def record_in(table: dict[str, StreamChange], place: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], stream: Any) -> None:
            table[place] = StreamChange(inputs[0], stream, stack.shared.state, record.is_token[name])

        return note

    return record_in


def _record_output(place: str, record: ActivationRecord) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        record.outputs[place] = output

    return note
