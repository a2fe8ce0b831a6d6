"""How widely attention looks."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.diagnostics.attention_maps import watched_attention
from minitransformer.diagnostics.base import Figures, Instrument, Scene
from minitransformer.diagnostics.places import sublayers_of


class AttentionEntropy(Instrument, name="attention-entropy"):
    """−Σ a log a in nats over the keys of a row of attention weights a, mean over heads and real queries.

    0 is one key, log(keys) all alike; entropies near 0 go with unstable training: Zhai et al. 2023 (arXiv 2303.06296).
    """

    def listen(self) -> AbstractContextManager[None]:
        self._rows: dict[str, Tensor] = {}
        return watched_attention(self.model, lambda name, weights: self._rows.update({name: entropy(weights)}))

    def look(self, scene: Scene) -> Figures:
        passage = scene.passage
        names = {module: name for name, module in self.model.named_modules()}
        figures: Figures = {}
        for place, branch in sublayers_of(self.model).items():
            found = self._rows.get(names[branch.sublayer])
            if found is not None:
                is_token = passage.is_token[place.split(".")[0]]
                figures[place] = (found if is_token is None else found.transpose(1, 2)[is_token]).mean()
        return figures


def entropy(weights: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows"]:
    """−Σ w log w in nats; the row of a query that may attend to nothing is 0, and so is its entropy."""
    return torch.special.entr(weights.float()).sum(-1)
