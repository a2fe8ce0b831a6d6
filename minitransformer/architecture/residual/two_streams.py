"""Placements with two streams: a normalised x, and y, the plain sum of all branches.

Notation: f is the sublayer (attention or feed-forward), o its output, N the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitransformer.architecture.residual.base import MakeNorm, Place, Residual, Sublayer

Streams = tuple[Tensor, Tensor]


class ResiDual(Residual, name="residual"):
    """o = f(x); x ← N(x + o) beside y ← y + η o, from y = η x; the output is x + N(y).

    η changes no result, as N(η y) = N(y), but in half precision a small one keeps y from overflowing. The eps of the
    last norm is small enough for that. Xie et al. 2023 (arXiv 2304.14802), section 2.
    """

    has_final_norm = True
    eta = 1.0

    def forward(self, stream: Streams, sublayer: Sublayer) -> Streams:
        x, y = stream
        branch = self.dropout(sublayer(x))
        return self.norm(x + branch), torch.add(y, branch, alpha=self.eta)

    @classmethod
    def open(cls, x: Tensor) -> Streams:
        return x, cls.eta * x

    @classmethod
    def state(cls, stream: Streams) -> Tensor:
        return stream[0]

    @classmethod
    def close(cls, stream: Streams, final_norm: nn.Module) -> Tensor:
        x, y = stream
        return x + final_norm(y)

    @classmethod
    def make_final_norm(cls, make_norm: MakeNorm) -> nn.Module:
        norm = make_norm()
        norm.eps = 1e-7  # type: ignore[assignment]
        return norm


class ScaledResiDual(ResiDual, name="residual-scaled"):
    """ResiDual with η = 0.05, for float16, as the authors released it."""

    eta = 0.05


class SiameseNorm(ResiDual, name="siamese"):
    """o = f(x + N₁(y)); x ← N₂(x + o) beside y ← y + o, from y = x; the output is x + N(y). arXiv 2602.08064.

    The sublayer reads both streams. From a secondary source: not compared with the authors' code.
    """

    def __init__(self, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__(make_norm, dropout, place)
        self.input_norm = make_norm()

    def forward(self, stream: Streams, sublayer: Sublayer) -> Streams:
        x, y = stream
        branch = self.dropout(sublayer(x + self.input_norm(y)))
        return self.norm(x + branch), y + branch
