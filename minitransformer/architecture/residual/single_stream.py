"""Placements with one stream and identical connections.

Notation: x is the residual stream, f the sublayer (attention or feed-forward), N the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minitransformer.architecture.residual.base import MakeNorm, Place, Residual, Sublayer
from minitransformer.settings import setting


class PostLN(Residual, name="post"):
    """x ← N(x + f(x)), and no norm at the end. Vaswani et al. 2017 (arXiv 1706.03762), section 3.1."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(x + self.dropout(sublayer(x)))


class PreLN(Residual, name="pre"):
    """x ← x + f(N(x)), and one norm after the last block. Xiong et al. 2020 (arXiv 2002.04745), figure 1b."""

    has_final_norm = True

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class ScaledPreLN(Residual, name="pre-scaled"):
    """x ← x + m f(N(x)) with a constant m, and one norm after the last block. Granite 3 (IBM 2024), its public code."""

    has_final_norm = True

    @dataclass(frozen=True)
    class Settings:
        multiplier: float = setting(0.22, help="factor of the output of every sublayer")

    def __init__(self, settings: Settings, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.multiplier = settings.multiplier

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.multiplier * self.dropout(sublayer(self.norm(x)))


class SandwichLN(Residual, name="sandwich"):
    """x ← x + N₂(f(N₁(x))), and one norm after the last block. Ding et al. 2021 (CogView, arXiv 2105.13290), 2.4."""

    has_final_norm = True

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.output_norm = make_norm()

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(self.output_norm(sublayer(self.norm(x))))


class PeriLN(SandwichLN, name="peri"):
    """Sandwich-LN, and a norm of the embeddings too. Kim et al. 2025 (arXiv 2502.02732), section 3."""

    has_embedding_norm = True


class OLMo2(Residual, name="olmo2"):
    """x ← x + N(f(x)), and one norm after the last block. OLMo 2 (arXiv 2501.00656), section 3.2.

    Attention's input is unbounded: use it with `qk_norm`, as the paper does; its code (OLMo-core) normalises the
    features of all heads together.
    """

    has_final_norm = True
    asks_for: ClassVar = {"qk_norm": "full"}

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(self.norm(sublayer(x)))


class NoNorm(Residual, name="none"):
    """x ← x + f(x), without any norm."""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, nn.Identity, dropout, place)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(sublayer(x))
