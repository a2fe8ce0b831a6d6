"""Where the norm stands around a sublayer: every residual placement is one class, found by its name.

Notation: x is the residual stream, f the sublayer (attention or feed-forward), N the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minitransformer.registry import Registered

Sublayer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Which sublayer a residual connection stands around, for placements that are not the same everywhere."""

    layer: int
    num_layers: int
    sublayer: str


class Residual(Registered, nn.Module, kind="residual placement"):
    """One residual connection around one sublayer, and what the stack does before the first and after the last.

    `stream` is what flows from one connection to the next: x for most placements, a tuple for some. Every connection
    owns the norm that its equation names; the stack owns the final norm, where `has_final_norm` says there is one.
    """

    has_final_norm = False

    def __init__(self, make_norm: Callable[[], nn.Module], dropout: float, place: Place) -> None:
        super().__init__()
        self.norm = make_norm()
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Any, sublayer: Sublayer) -> Any:
        """The stream after this sublayer: the equation of the placement."""
        raise NotImplementedError

    @staticmethod
    def open(x: Tensor) -> Any:
        """The stream that enters the first sublayer, from the embeddings."""
        return x

    @staticmethod
    def state(stream: Any) -> Tensor:
        """x: the part of the stream that the next sublayer reads, for who looks at it from outside."""
        return stream

    @staticmethod
    def close(stream: Any, final_norm: nn.Module) -> Tensor:
        """The output of the stack, from the stream that leaves the last sublayer."""
        return final_norm(stream)


class PostLN(Residual, name="post"):
    """x ← N(x + f(x)), and no norm at the end. Vaswani et al. 2017 (arXiv 1706.03762), section 3.1."""

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.norm(x + self.dropout(sublayer(x)))


class PreLN(Residual, name="pre"):
    """x ← x + f(N(x)), and one norm after the last block. Xiong et al. 2020 (arXiv 2002.04745), figure 1b."""

    has_final_norm = True

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class SandwichLN(Residual, name="sandwich"):
    """x ← x + N₂(f(N₁(x))), and one norm after the last block. Ding et al. 2021 (CogView, arXiv 2105.13290), 2.4."""

    has_final_norm = True

    def __init__(self, make_norm: Callable[[], nn.Module], dropout: float, place: Place) -> None:
        super().__init__(make_norm, dropout, place)
        self.output_norm = make_norm()

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(self.output_norm(sublayer(self.norm(x))))


class OLMo2(Residual, name="olmo2"):
    """x ← x + N(f(x)), and one norm after the last block. OLMo 2 (arXiv 2501.00656), section 3.2."""

    has_final_norm = True

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return x + self.dropout(self.norm(sublayer(x)))


class ResiDual(Residual, name="residual"):
    """x ← N(x + f(x)) beside y ← y + f(x); the output is x + N(y). Xie et al. 2023 (arXiv 2304.14802), section 2."""

    has_final_norm = True

    @staticmethod
    def open(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def forward(self, stream: tuple[Tensor, Tensor], sublayer: Sublayer) -> tuple[Tensor, Tensor]:
        x, y = stream
        branch = self.dropout(sublayer(x))
        return self.norm(x + branch), y + branch

    @staticmethod
    def state(stream: tuple[Tensor, Tensor]) -> Tensor:
        return stream[0]

    @staticmethod
    def close(stream: tuple[Tensor, Tensor], final_norm: nn.Module) -> Tensor:
        x, y = stream
        return x + final_norm(y)
