"""A placement that depends on the training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitransformer.architecture.residual import Residual
from minitransformer.settings import setting


class ProRes(Residual, name="prores"):
    """x ← x + min(1, t / T_l) f(N(x)) after t updates, where T_l grows linearly from T / L in layer 1 to T in layer L.

    One norm after the last block. 2603.05369 on arXiv, its linear schedule on Pre-LN, as the authors' code has it
    (dandingsky/ProRes).
    """

    has_final_norm = True

    @dataclass(frozen=True)
    class Settings:
        warmup_steps: int = setting(1000, at_least=1, help="updates T after which the last layer counts in full")

    def __init__(self, settings: Settings, make_norm, dropout, place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        last, layers = settings.warmup_steps, place.num_layers
        first = max(1, last // layers)
        self.warmup = first + (last - first) * place.layer / max(1, layers - 1)
        self.register_buffer("share", torch.zeros(()))  # in checkpoints, for a model that is opened to be used

    def begin_step(self, step: int) -> None:
        self.share.fill_(min(1.0, step / self.warmup))

    def forward(self, x: Tensor, sublayer) -> Tensor:
        return x + self.share * self.dropout(sublayer(self.norm(x)))
