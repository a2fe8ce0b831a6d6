"""Attention weights and residual streams of a forward pass on one text, recorded by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitransformer.analysis.look_record import AttentionMaps, LookRequest, MapPlan, ResidualNorms
from minitransformer.architecture.additive_attention import AdditiveAttention, additive_attention_weights
from minitransformer.architecture.block import Stack
from minitransformer.diagnostics.attention_maps import captured_attention
from minitransformer.generation.modes import evaluating


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
