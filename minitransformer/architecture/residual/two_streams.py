"""Placements with two streams: x, which is normalised in every connection, and y, the plain sum of all branches.

Notation: f is the sublayer (attention or feed-forward), o its output, N the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.architecture.residual.base import MakeNorm, Place, Residual, Sublayer, Surroundings
from minitransformer.errors import UserError
from minitransformer.settings import setting

Streams = tuple[Tensor, Tensor]


class ResiDual(Residual, name="residual"):
    """o = f(x); x ← N(x + o) beside y ← y + η o, from y = η x; the output is x + N(y).

    η does not change the result, as N(η y) = N(y), but a small η keeps y from overflowing in half precision. The eps of
    the last norm is a hundredth of the others, small enough for this: 1e-7 and 1e-5 in the authors' code
    (microsoft/ResiDual). Xie et al. 2023 (arXiv 2304.14802), section 2.
    """

    has_final_norm = True

    @dataclass(frozen=True)
    class Settings:
        eta: float = setting(
            1.0, above=0, at_most=1, help="scale η of the plain sum, against overflow in half precision"
        )

    class Shared(Residual.Shared):
        def __init__(self, settings: ResiDual.Settings, places: Sequence[Place]) -> None:
            super().__init__(settings, places)
            self.eta = settings.eta

        def open(self, x: Tensor) -> Streams:
            return x, self.eta * x

        def close(self, stream: Streams, final_norm: nn.Module) -> Tensor:
            x, y = stream
            return x + final_norm(y)

    def __init__(self, settings: Settings, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.eta = settings.eta

    def forward(self, stream: Streams, sublayer: Sublayer) -> Streams:
        x, y = stream
        branch = self.dropout(sublayer(x))
        return self.norm(x + branch), torch.add(y, branch, alpha=self.eta)

    @classmethod
    def make_final_norm(cls, settings: Settings, make_norm: MakeNorm) -> nn.Module:
        norm: Any = make_norm()
        if hasattr(norm, "eps"):
            norm.eps = norm.eps / 100
        return norm

    @classmethod
    def check(cls, settings: Settings, around: Surroundings) -> None:
        if settings.eta != 1 and not around.norm.undoes_scale:
            raise UserError(
                f"residual {cls.name!r} scales a stream, which norm {around.norm.name!r} does not undo: "
                "choose --residual residual, or another --norm"
            )


class ScaledResiDual(ResiDual, name="residual-scaled"):
    """ResiDual with η = 0.05, for float16, as the authors released it."""

    @dataclass(frozen=True)
    class Settings(ResiDual.Settings):
        eta: float = setting(
            0.05, above=0, at_most=1, help="scale η of the plain sum, against overflow in half precision"
        )


class SiameseNorm(Residual, name="siamese"):
    """x ← N₁(x), o = f(N₃(x + N₂(y))); x ← x + o / √(2l) beside y ← y + o in layer l, counted from 1, from y = x.

    The output is N₃(N₁(x) + N₂(y)): a Post-LN stream beside a Pre-LN stream, and each sublayer reads and writes both.
    Li et al. 2026 (arXiv 2602.08064), as in the authors' code for DeiT (Qwen-Applications/SiameseNorm).
    """

    has_final_norm = True

    class Shared(Residual.Shared):
        def open(self, x: Tensor) -> Streams:
            return x, x

        def close(self, stream: Streams, final_norm: nn.Module) -> Tensor:
            return final_norm(*stream)

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(settings, make_norm, dropout, place)
        self.other_norm, self.input_norm = make_norm(), make_norm()
        self.scale = (2 * (place.layer + 1)) ** -0.5

    def forward(self, stream: Streams, sublayer: Sublayer) -> Streams:
        x, y = self.norm(stream[0]), stream[1]
        branch = self.dropout(sublayer(self.input_norm(x + self.other_norm(y))))
        return x + self.scale * branch, y + branch

    @classmethod
    def make_final_norm(cls, settings: Any, make_norm: MakeNorm) -> nn.Module:
        return NormOfBoth(make_norm)


class NormOfBoth(nn.Module):
    """N₃(N₁(x) + N₂(y)) of two streams."""

    def __init__(self, make_norm: MakeNorm) -> None:
        super().__init__()
        self.norm, self.other_norm, self.output_norm = make_norm(), make_norm(), make_norm()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.output_norm(self.norm(x) + self.other_norm(y))
