"""Where the norm stands around a sublayer: the interface of residual placements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.norms import Norm
from minitransformer.registry import Registered

Sublayer = Callable[..., Tensor]
"""A sublayer f, as a function of what it reads. One with self-attention attends, if called as `f(x, mix_values=g)`, to
g(V) in place of its values V, [batch, kv_heads, new, head_dim]; a cache keeps g(V)."""
MakeNorm = Callable[[], nn.Module]
RMS_EPS = 1e-6
"""added to mean squares where a placement divides by their root, outside of the model's norms"""


@dataclass(frozen=True)
class Place:
    """Where a residual connection stands, for placements that are not the same everywhere.

    `sublayer` is "attention", "cross_attention", "feedforward", or "parallel" for all of them in one. In an
    encoder-decoder, `partner_layers` are the layers of the other stack, and the decoder's has a memory.
    """

    layer: int
    num_layers: int
    sublayer: str
    partner_layers: int = 0
    has_memory: bool = False
    _: KW_ONLY
    d_model: int

    @property
    def index(self) -> int:
        """How many connections of the stack stand before this one."""
        if self.sublayer == "parallel":
            return self.layer
        sublayers = ("attention", "cross_attention", "feedforward") if self.has_memory else ("attention", "feedforward")
        return self.layer * len(sublayers) + sublayers.index(self.sublayer)

    @property
    def num_sublayers(self) -> int:
        """Sublayers of the whole stack."""
        return (3 if self.has_memory else 2) * self.num_layers

    @property
    def num_connections(self) -> int:
        """Residual connections of the whole stack: as many as sublayers, or one a layer where that is for all."""
        return self.num_layers if self.sublayer == "parallel" else self.num_sublayers


@dataclass(frozen=True)
class Surroundings:
    """What a model has around its connections, for placements that do not go with all of it."""

    num_layers: int
    """of its smallest stack"""
    is_parallel: bool
    """whether one connection has all sublayers of a block"""
    norm: type[Norm]


@dataclass(frozen=True)
class BranchGains:
    """What a placement multiplies the initial weights of its sublayer with, in place of what an initialisation does by
    the number of sublayers.

    `scores` is for the matrices that only say where to look (queries, keys, routers), `values` for all others, through
    which the output grows.
    """

    scores: float = 1.0
    values: float = 1.0


class Residual(Registered, nn.Module, kind="residual placement"):
    """One residual connection around one sublayer.

    Every connection owns the norms that its equation names; the stack owns those of the embeddings and of the end,
    where `has_embedding_norm` and `has_final_norm` say that there is one. With `has_qkv_norm`, attention normalises its
    queries, keys and values: as the model says, or as `asks_for` does where the model says nothing.

    Parameters start as the constructor makes them; linear maps and embeddings are drawn by the model's initialisation,
    after which a method `reset_parameters` may change them. A placement, or any other module, that depends on the
    training step has a method `begin_step(step)`, and one that changes weights after each update `end_step(model)`: see
    `Model`.
    """

    class Shared(nn.Module):
        """What a placement has once for a whole stack: how its stream begins and ends, and parameters of its own.

        `stream` is what flows from one connection to the next: x for most placements; otherwise a tuple, in which
        `open` may also hand parameters to all connections. A placement that needs more has a class `Shared` of its own.
        `places` are those of all connections of the stack, in their order.
        """

        def __init__(self, settings: Any, places: Sequence[Place]) -> None:
            super().__init__()

        def open(self, x: Tensor) -> Any:
            """The stream that enters the first sublayer, from the embeddings."""
            return x

        def state(self, stream: Any) -> Tensor:
            """x: the part of the stream that the next sublayer reads, for callers that inspect it."""
            return stream

        def close(self, stream: Any, final_norm: nn.Module) -> Tensor:
            """The output of the stack, from the stream that leaves the last sublayer."""
            return final_norm(stream)

        def calibrate(self, connections: Sequence[Residual], run: Callable[[], object]) -> None:
            """Set what depends on real data, before the first step: `run` passes a batch through all `connections`."""

    has_embedding_norm = False
    has_final_norm = False
    has_qkv_norm = False
    asks_for: ClassVar[Mapping[str, Any]] = {}
    """choices of a model's other parts that its authors made with it, for who compares it as they published it"""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__()
        self.place = place
        self.norm = make_norm()
        self.dropout = Dropout(dropout)

    def forward(self, stream: Any, sublayer: Sublayer) -> Any:
        """The stream after this sublayer: the equation of the placement."""
        raise NotImplementedError

    @classmethod
    def make_final_norm(cls, settings: Any, make_norm: MakeNorm) -> nn.Module:
        """What `Shared.close` is given."""
        return make_norm() if cls.has_final_norm else nn.Identity()

    @classmethod
    def check(cls, settings: Any, around: Surroundings) -> None:
        """Raises `UserError` for a model in which this would be another placement, or no equation at all."""

    def branch_gains(self) -> BranchGains | None:
        """What this placement asks of the initial weights of the sublayer here; None is nothing."""
        return None
