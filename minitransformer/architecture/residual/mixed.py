"""Placements that differ between layers, or between attention and the feed-forward network.

Notation: x is the residual stream, f the sublayer (attention or feed-forward), N the norm.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from minitransformer.architecture.residual.base import BranchGains, MakeNorm, Place, Residual, Sublayer, Surroundings
from minitransformer.architecture.residual.single_stream import PostLN, PreLN
from minitransformer.errors import UserError


class MixLN(Residual, name="mix"):
    """Post-LN in the first quarter of the layers, Pre-LN in the others, and one norm after the last block.

    Fewer than four layers are refused. Li et al. 2024 (arXiv 2412.13795), section 3.2.
    """

    has_final_norm = True
    post_share = 0.25

    @classmethod
    def check(cls, settings: Any, around: Surroundings) -> None:
        if 0 < cls.post_share * around.num_layers < 1:
            raise UserError(
                f"residual {cls.name!r} has Post-LN in the first quarter of the layers, and {around.num_layers} "
                "layers have none: choose at least 4, or --residual pre"
            )

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, nn.Identity, dropout, place)
        is_post = place.layer < int(self.post_share * place.num_layers)
        self.connection = (PostLN if is_post else PreLN)(settings, make_norm, dropout, place)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.connection(x, sublayer)


class HybridNorm(Residual, name="hybrid"):
    """x ← x + f(x) around attention, which normalises its queries, keys and values; x ← N(x) + f(N(x)) around others.

    One norm after the last block. Zhuo et al. 2025 (arXiv 2503.04598), section 3.2; their code normalises each head
    separately, and uses Megatron's initialisation.
    """

    has_final_norm = True
    has_qkv_norm = True
    asks_for: ClassVar = {"qk_norm": "head", "value_norm": True, "init": "xavier-scaled"}

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        is_attention = place.sublayer in ("attention", "cross_attention")
        super().__init__(settings, nn.Identity if is_attention else make_norm, dropout, place)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        x = self.norm(x)
        return x + self.dropout(sublayer(x))


class HybridNormStar(Residual, name="hybrid-star"):
    """HybridNorm, with Pre-LN around both sublayers of the first block. Zhuo et al. 2025, section 3.3: HybridNorm*."""

    has_final_norm = True
    has_qkv_norm = True
    asks_for = HybridNorm.asks_for

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, nn.Identity, dropout, place)
        self.connection = (HybridNorm if place.layer else PreLN)(settings, make_norm, dropout, place)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.connection(x, sublayer)


class B2TConnection(Residual, name="b2t"):
    """Post-LN, but the feed-forward network adds the block's input b too: x ← N(b + x + f(x)).

    The stream is (b, x). Initial weights are scaled by L^-½ in a stack of L layers, as in the authors' code.
    Takase et al. 2022 (arXiv 2206.00330), section 4.
    """

    class Shared(Residual.Shared):
        def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

        def state(self, stream: tuple[Tensor, Tensor]) -> Tensor:
            return stream[1]

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        bottom, x = stream
        total = x + self.dropout(sublayer(x))
        if self.place.sublayer != "feedforward":
            return bottom, self.norm(total)
        x = self.norm(bottom + total)
        return x, x

    @classmethod
    def check(cls, settings: Any, around: Surroundings) -> None:
        if around.is_parallel:
            raise UserError(
                f"residual {cls.name!r} adds the input of a block to the output of its feed-forward network, and in a "
                "parallel block that is Post-LN: choose --block sequential, or --residual post"
            )

    def branch_gains(self) -> BranchGains:
        gain = self.place.num_layers**-0.5
        return BranchGains(scores=gain, values=gain)
