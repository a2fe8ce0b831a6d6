"""One forward pass, seen from outside: the residual stream between layers, and what the sublayers add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitransformer.architecture.block import Stack
from minitransformer.diagnostics.places import layers_of, stacks_of, sublayers_of

Loss = Callable[[], Tensor]
"""A forward pass of the model on a batch of its own: the mean loss, a scalar."""


@dataclass(frozen=True)
class Crossing:
    """The residual stream before and after a layer ("stack.0") or a residual connection ("stack.0.attention").

    `before` and `after` are streams as the placement has them; `state` takes x out of one.
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
class Passage:
    """What happened in a forward pass, by place."""

    loss: Tensor = field(default_factory=lambda: torch.tensor(torch.nan))
    layers: dict[str, Crossing] = field(default_factory=dict)
    """in the order in which they were crossed"""
    connections: dict[str, Crossing] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """of sublayers, before the residual connection"""
    is_token: dict[str, Tensor | None] = field(default_factory=dict)
    """by stack: False at padding; None where there is none"""


def watch_a_pass(
    model: nn.Module, loss: Loss, is_token: Mapping[str, Bool[Tensor, "batch length"]] | None = None
) -> Passage:
    """Compute `loss` without gradients, and note what happens in every stack of `model` meanwhile.

    `is_token` is False at padding by stack, for those that are not told of it.
    """
    passage = Passage(is_token=dict(is_token or {}))
    handles = _listen(model, passage)
    try:
        with torch.no_grad():
            passage.loss = loss()
    finally:
        for handle in handles:
            handle.remove()
    return passage


def _listen(model: nn.Module, passage: Passage) -> list[RemovableHandle]:
    handles = [
        stack.register_forward_pre_hook(_note_tokens(name, passage), with_kwargs=True)
        for name, stack in stacks_of(model).items()
    ]
    for place, block in layers_of(model).items():
        stack = place.rpartition(".")[0]
        note = _note_crossing(stack, stacks_of(model)[stack], passage)
        handles.append(block.register_forward_hook(note(passage.layers, place)))
        for connection in dict.fromkeys(branch.residual for branch in block.branches):
            inner = f"{place}.{connection.place.sublayer}"
            handles.append(connection.register_forward_hook(note(passage.connections, inner)))
    for place, branch in sublayers_of(model).items():
        handles.append(branch.sublayer.register_forward_hook(_note_output(place, passage)))
    return handles


def _note_tokens(stack: str, passage: Passage) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        told = options.get("is_token")
        passage.is_token[stack] = passage.is_token.get(stack) if told is None else told

    return note


def _note_crossing(name: str, stack: Stack, passage: Passage) -> Callable[[dict[str, Crossing], str], Any]:
    def note_in(table: dict[str, Crossing], place: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], stream: Any) -> None:
            table[place] = Crossing(inputs[0], stream, stack.shared.state, passage.is_token[name])

        return note

    return note_in


def _note_output(place: str, passage: Passage) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        passage.outputs[place] = output

    return note
