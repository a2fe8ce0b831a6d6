"""Attention weights of every head, recorded by hooks, and their entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.attention import MultiHeadAttention, attention_weights
from minitransformer.diagnostics.base import Diagnostic, DiagnosticContext, Figures
from minitransformer.diagnostics.modules import sublayers_of

AttentionMap = Float[Tensor, "batch heads query key"]


@contextmanager
def captured_attention(model: nn.Module) -> Iterator[dict[str, AttentionMap]]:
    """Within it, each forward pass of `model` writes its attention weights to the yielded dictionary.

    Keys are names of modules, such as "stack.blocks.0.attention" or "decoder.blocks.0.cross_attention"; values are
    [batch, heads, query, key], before dropout and detached, and remain after the context. A second pass
    replaces them: with a cache, they are those of the newest tokens. Compiled models are not hooked.
    """
    maps: dict[str, AttentionMap] = {}
    with hooked_attention(model, maps.__setitem__):
        yield maps


@contextmanager
def hooked_attention(model: nn.Module, note: Callable[[str, AttentionMap], Any]) -> Iterator[None]:
    """Within it, `note` is called with the name and the weights of each attention, for callers that keep a summary."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, MultiHeadAttention):
                hooks.enter_context(_hooked(name, module, note))
        yield


@contextmanager
def _hooked(name: str, attention: MultiHeadAttention, note: Callable[[str, AttentionMap], Any]) -> Iterator[None]:
    kernel = attention.kernel

    def noting(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, **view: Any) -> Tensor:
        with torch.no_grad():
            note(name, attention_weights(q, k, **view))
        return kernel(q, k, v, dropout=dropout, **view)

    attention.kernel = noting
    try:
        yield
    finally:
        attention.kernel = kernel


class AttentionEntropy(Diagnostic, name="attention-entropy"):
    """−Σ a log a in nats over the keys of a row of attention weights a, mean over heads and real queries.

    0 means a single key, log(keys) uniform attention; entropies near 0 accompany unstable training: Zhai et al. 2023
    (arXiv 2303.06296).
    """

    def hooks(self) -> AbstractContextManager[None]:
        self._rows: dict[str, Tensor] = {}
        return hooked_attention(self.model, lambda name, weights: self._rows.update({name: entropy(weights)}))

    def measure(self, context: DiagnosticContext) -> Figures:
        record = context.record
        names = {module: name for name, module in self.model.named_modules()}
        figures: Figures = {}
        for place, branch in sublayers_of(self.model).items():
            found = self._rows.get(names[branch.sublayer])
            if found is not None:
                is_token = record.is_token[place.split(".")[0]]
                figures[place] = (found if is_token is None else found.transpose(1, 2)[is_token]).mean()
        return figures


def entropy(weights: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows"]:
    """−Σ w log w in nats; 0 for a fully masked query."""
    return torch.special.entr(weights.float()).sum(-1)
