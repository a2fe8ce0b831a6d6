"""Attention entropy."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.diagnostics.attention_maps import hooked_attention
from minitransformer.diagnostics.base import Diagnostic, DiagnosticContext, Figures
from minitransformer.diagnostics.modules import sublayers_of


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
