"""The request and the result of a look at a model, as plain data, and the hooks that record a forward pass for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitransformer.architecture.additive_attention import AdditiveAttention, additive_attention_weights
from minitransformer.architecture.block import Stack
from minitransformer.diagnostics.attention import captured_attention
from minitransformer.errors import UserError
from minitransformer.generation.modes import evaluating
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class LookRequest:
    """What to inspect. Raises `UserError` for invalid numbers."""

    prompt: str
    target: str | None = None
    """target text of an encoder-decoder; None is its own greedy output"""
    last: int | None = None
    """keep only this many tokens at the end of the prompt"""
    layers: Sequence[int] = ()
    """layers whose attention is kept, counted from 0; empty is all"""

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UserError(f"last is {self.last}: it must be at least 1")

    def layers_of(self, count: int) -> list[int]:
        """The layers among `count` whose attention is kept."""
        return [layer for layer in range(count) if not self.layers or layer in self.layers]


@dataclass(frozen=True)
class Text:
    """The tokens of one input of a model."""

    title: str
    tokens: Sequence[int]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights from `queries` to `keys`, two names in `Look.texts`; each row sums to 1."""

    title: str
    queries: str
    keys: str
    layers: Sequence[int]
    weights: Float[Tensor, "layers heads query key"]


@dataclass(frozen=True)
class Prediction:
    """The prediction at one position of a text; loss and entropy in nats.

    `place` may be one past the text. `token` is the actual token, or None if unknown: then there is no
    probability and no loss. `guesses` are the likeliest tokens with their probabilities, in descending order.
    """

    place: int
    token: int | None
    probability: float | None
    loss: float | None
    entropy: float
    guesses: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class ResidualNorms:
    """‖x‖₂ of the residual stream for each token, before the first block and after each."""

    title: str
    text: str
    norms: Float[Tensor, "states tokens"]


@dataclass(frozen=True)
class Look:
    """The whole result. `predicted` is the name of the text that the predictions are for."""

    texts: dict[str, Text]
    maps: Sequence[AttentionMaps]
    predicted: str
    predictions: Sequence[Prediction] = ()
    norms: Sequence[ResidualNorms] = ()
    remarks: Sequence[str] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The losses in nats of the tokens that have one."""
        return [prediction.loss for prediction in self.predictions if prediction.loss is not None]


@dataclass(frozen=True)
class MapPlan:
    """The modules of a group of maps: `modules` is a name with a placeholder for the layer."""

    title: str
    modules: str
    queries: str
    keys: str
    num_layers: int


@dataclass(frozen=True)
class Watched:
    """The record of a forward pass on one text."""

    weights: dict[str, Tensor]
    """attention weights by module name, [1, heads, query, key]"""
    streams: dict[str, list[Tensor]]
    """x by stack name, before the first block and after each, [1, length, d_model]"""

    def maps(self, plans: Sequence[MapPlan], request: LookRequest) -> list[AttentionMaps]:
        """The attention maps of `plans`, for the requested layers."""
        made = []
        for plan in plans:
            layers = request.layers_of(plan.num_layers)
            if layers:
                weights = torch.stack([self.weights[plan.modules.format(layer)][0] for layer in layers])
                made.append(AttentionMaps(plan.title, plan.queries, plan.keys, layers, weights.float().cpu()))
        return made

    def norms(self, *stacks: tuple[str, str, str]) -> list[ResidualNorms]:
        """The residual norms of `stacks`, each given by name, title and input text."""
        return [
            ResidualNorms(title, text, torch.cat(self.streams[name]).float().norm(dim=-1).cpu())
            for name, title, text in stacks
            if name in self.streams
        ]


@contextmanager
def watched(model: nn.Module) -> Iterator[Watched]:
    """Record the forward pass inside this context, in eval mode."""
    streams: dict[str, list[Tensor]] = {}
    alignments: dict[str, list[Tensor]] = {}
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, Stack):
            handles += _watch_stack(module, streams.setdefault(name, []))
        if isinstance(module, AdditiveAttention):
            handles.append(_watch_alignment(module, alignments.setdefault(name, [])))
    try:
        with evaluating(model), captured_attention(model) as weights:
            seen = Watched(weights, streams)
            yield seen
        for name, rows in alignments.items():
            seen.weights[name] = torch.cat(rows, dim=1)[:, None]
    finally:
        for handle in handles:
            handle.remove()


def _watch_stack(stack: Stack, kept: list[Tensor]) -> list[RemovableHandle]:
    def keep(stream: Any) -> None:
        kept.append(stack.shared.state(stream).detach())

    first = stack.blocks[0].register_forward_pre_hook(lambda block, inputs: keep(inputs[0]))
    return [first, *(block.register_forward_hook(lambda block, _, output: keep(output)) for block in stack.blocks)]


def _watch_alignment(attention: AdditiveAttention, kept: list[Tensor]) -> RemovableHandle:
    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        state, _, keys, *_ = inputs
        kept.append(additive_attention_weights(attention.query(state)[:, None], keys, attention.score.weight[0]))

    return attention.register_forward_pre_hook(keep)
