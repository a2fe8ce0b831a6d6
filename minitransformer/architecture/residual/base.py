"""The interface of residual placements: a residual connection and its norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.norms import Norm
from minitransformer.registry import Registered

Sublayer = Callable[..., Tensor]
"""A sublayer f, as a function of its input. Self-attention, called as `f(x, mix_values=g)`, attends to
g(V) instead of its values V, [batch, kv_heads, new, head_dim]; the cache stores g(V)."""
MakeNorm = Callable[[], nn.Module]
RMS_EPS = 1e-6
"""ε of RMS norms inside a placement"""


@dataclass(frozen=True)
class Place:
    """The location of a residual connection, for placements that depend on it.

    `sublayer` is "attention", "cross_attention", "feedforward", or "parallel" for all in one. In an
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
        """The number of connections before this one in the stack."""
        if self.sublayer == "parallel":
            return self.layer
        sublayers = ("attention", "cross_attention", "feedforward") if self.has_memory else ("attention", "feedforward")
        return self.layer * len(sublayers) + sublayers.index(self.sublayer)

    @property
    def num_sublayers(self) -> int:
        """Number of sublayers in the stack."""
        return (3 if self.has_memory else 2) * self.num_layers

    @property
    def num_connections(self) -> int:
        """Number of residual connections in the stack: one per sublayer, or one per layer in parallel blocks."""
        return self.num_layers if self.sublayer == "parallel" else self.num_sublayers


@dataclass(frozen=True)
class Surroundings:
    """The parts of the model that a placement may be incompatible with."""

    num_layers: int
    """layers of its smallest stack"""
    is_parallel: bool
    """whether all sublayers of a block share one connection"""
    norm: type[Norm]


@dataclass(frozen=True)
class BranchGains:
    """Factors of the initial weights of a sublayer, replacing the initialisation's scaling by
    the number of sublayers.

    `scores` is for `ScoreProjection`s (queries, keys, routers), `values` for all others, which determine the
    size of the output.
    """

    scores: float = 1.0
    values: float = 1.0


class Residual(Registered, nn.Module, kind="residual placement"):
    """One residual connection around one sublayer.

    Every connection owns the norms of its equation; the stack owns the embedding norm and the final norm,
    if `has_embedding_norm` and `has_final_norm`. With `has_qkv_norm`, attention normalises its
    queries, keys and values: by the model's settings, or by default as in `asks_for`.

    Parameters keep their constructor's values; linear layers and embeddings are initialised by the model,
    after which a method `reset_parameters` may change them. A placement, or any other module, that depends on the
    training step has a method `begin_step(step)`, and one that changes weights after each update `end_step(model)`: see
    `Model`.
    """

    class Shared(nn.Module):
        """The part of a placement shared by a whole stack: how the stream starts and ends, and shared parameters.

        `stream` is passed from one connection to the next: x for most placements; otherwise a tuple, in which
        `open` may also pass parameters to all connections. A placement that needs more defines its own `Shared`.
        `places` are those of all connections of the stack, in order.
        """

        def __init__(self, settings: Any, places: Sequence[Place]) -> None:
            super().__init__()

        def open(self, x: Tensor) -> Any:
            """The stream into the first sublayer, from the embeddings."""
            return x

        def state(self, stream: Any) -> Tensor:
            """x, the part of the stream that the next sublayer reads: of a tuple, the first."""
            return stream[0] if isinstance(stream, tuple) else stream

        def close(self, stream: Any, final_norm: nn.Module) -> Tensor:
            """The output of the stack, from the stream after the last sublayer."""
            return final_norm(self.state(stream))

        def calibrate(self, connections: Sequence[Residual], run: Callable[[], object]) -> None:
            """Set what depends on data, before the first step: `run` is a forward pass through all `connections`."""

    has_embedding_norm = False
    has_final_norm = False
    has_qkv_norm = False
    asks_for: ClassVar[Mapping[str, Any]] = {}
    """other settings of the model that its authors used with it, for faithful comparisons"""

    def __init__(self, settings: Any, make_norm: MakeNorm, dropout: float, place: Place) -> None:
        super().__init__()
        self.place = place
        self.norm = make_norm()
        self.dropout = Dropout(dropout)

    def forward(self, stream: Any, sublayer: Sublayer) -> Any:
        """The stream after this sublayer, by the equation of the placement."""
        raise NotImplementedError

    @classmethod
    def make_final_norm(cls, settings: Any, make_norm: MakeNorm) -> nn.Module:
        """The final norm, passed to `Shared.close`."""
        return make_norm() if cls.has_final_norm else nn.Identity()

    @classmethod
    def check(cls, settings: Any, around: Surroundings) -> None:
        """Raises `UserError` for a model in which this placement is undefined or equals another one."""

    def branch_gains(self) -> BranchGains | None:
        """Factors of the initial weights of this sublayer; None for none."""
        return None
