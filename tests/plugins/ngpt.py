"""A placement that changes weights after each update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.architecture.linear import OutputProjection
from minitransformer.architecture.residual import Residual


class NormalisedTransformer(Residual, name="ngpt"):
    """x ← n(x + |α| ⊙ (n(f(x)) − x)) with n(x) = x / ‖x‖, from x = n(embedding); there is no other norm.

    After each update, every row of a matrix that reads x, every column of one that writes to it, and every embedding is
    divided by its length. α starts at 0.05, stored as a weight from 1/√d_model. Loshchilov et al. 2024 (nGPT, arXiv
    2410.01131), section 2, as the authors' code has it (NVIDIA/ngpt); their scales of queries, keys, hidden features
    and logits are no part of a placement.
    """

    class Shared(Residual.Shared):
        def open(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1)

        @torch.no_grad()
        def end_step(self, model: nn.Module) -> None:
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    dim = 0 if isinstance(module, OutputProjection) else -1
                    module.weight.copy_(F.normalize(module.weight, dim=dim))

    def __init__(self, settings, make_norm, dropout, place) -> None:
        super().__init__(settings, nn.Identity, dropout, place)
        self.start = place.d_model**-0.5
        self.alpha = nn.Parameter(torch.full((place.d_model,), self.start))

    def forward(self, x: Tensor, sublayer) -> Tensor:
        branch = F.normalize(self.dropout(sublayer(x)), dim=-1)
        return F.normalize(x + (self.alpha * (0.05 / self.start)).abs() * (branch - x), dim=-1)
