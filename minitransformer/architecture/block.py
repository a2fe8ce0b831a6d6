"""Transformer blocks, and the stack of blocks of an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import and_
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention
from minitransformer.architecture.cache import ChosenSlots, KVCache, LayerCache, MemoryCache, Slots, tokens_as_slots
from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.embeddings import TokenSmear
from minitransformer.architecture.masks import causal_mask, document_mask, padding_mask, sliding_window_mask
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual
from minitransformer.architecture.residual.base import Sublayer
from minitransformer.registry import Registered
from minitransformer.settings import Chosen


@dataclass(frozen=True)
class Memory:
    """The encoder output that cross-attention attends to, and its padding mask (None: no padding)."""

    values: Float[Tensor, "batch length d_model"]
    is_token: Bool[Tensor, "batch length"] | None = None

    @property
    def view(self) -> AttentionView:
        return AttentionView(mask=None if self.is_token is None else padding_mask(self.is_token))

    def select(self, rows: Int[Tensor, "selected"]) -> Memory:
        """The given rows of the batch, in this order."""
        return Memory(self.values[rows], None if self.is_token is None else self.is_token[rows])


@dataclass(frozen=True)
class BlockParts:
    """The components of a block; `make_residual` takes the sublayer's name."""

    attention: MultiHeadAttention
    feedforward: nn.Module
    make_residual: Callable[[str], Residual]
    make_norm: Callable[[], nn.Module]
    cross_attention: MultiHeadAttention | None = None


@dataclass(frozen=True)
class Branch:
    """A sublayer, named "attention", "cross_attention" or "feedforward", and its residual connection."""

    name: str
    sublayer: nn.Module
    residual: Residual


class Block(Registered, nn.Module, kind="block"):
    """How attention and the feed-forward network are arranged, each inside a residual connection."""

    is_parallel = False
    """whether all sublayers share one residual connection"""

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__()
        self.attention = parts.attention
        self.cross_attention = parts.cross_attention
        self.feedforward = parts.feedforward

    def forward(
        self,
        stream: Any,
        *,
        view: AttentionView,
        cache: LayerCache | None = None,
        memory: Memory | None = None,
        memory_cache: MemoryCache | None = None,
    ) -> Any:
        """The residual stream after this block; cross-attention attends to `memory`."""

        def attend(x: Tensor, **given: Any) -> Tensor:
            return self.attention(x, view=replace(view, **given) if given else view, cache=cache)

        cross_attend = None
        if self.cross_attention is not None:
            assert memory is not None, "cross-attention without a memory"
            cross_attend = partial(self.cross_attention, memory=memory.values, view=memory.view, cache=memory_cache)
        return self.arrange(stream, attend, cross_attend)

    def arrange(self, stream: Any, attend: Sublayer, cross_attend: Sublayer | None) -> Any:
        """The residual stream after self-attention, cross-attention if present, and the feed-forward network."""
        raise NotImplementedError

    @property
    def branches(self) -> list[Branch]:
        """The sublayers in order, for callers that initialise or inspect them."""
        sublayers = {name: getattr(self, name) for name in ("attention", "cross_attention", "feedforward")}
        return [Branch(name, part, self.residual_of(name)) for name, part in sublayers.items() if part is not None]

    def residual_of(self, sublayer: str) -> Residual:
        """The residual connection of the named sublayer."""
        raise NotImplementedError


class TransformerBlock(Block, name="sequential"):
    """One sublayer after the other. Vaswani et al. 2017 (arXiv 1706.03762), section 3.1."""

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__(settings, parts)
        self.attention_residual = parts.make_residual("attention")
        if parts.cross_attention is not None:
            self.cross_attention_residual = parts.make_residual("cross_attention")
        self.feedforward_residual = parts.make_residual("feedforward")

    def arrange(self, stream: Any, attend: Sublayer, cross_attend: Sublayer | None) -> Any:
        stream = self.attention_residual(stream, attend)
        if cross_attend is not None:
            stream = self.cross_attention_residual(stream, cross_attend)
        return self.feedforward_residual(stream, self.feedforward)

    def residual_of(self, sublayer: str) -> Residual:
        return getattr(self, f"{sublayer}_residual")


class ParallelBlock(Block, name="parallel"):
    """All sublayers in one residual connection: with Pre-LN, x + Attention(N(x)) + FeedForward(N(x)).

    Wang and Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 2.
    """

    is_parallel = True

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__(settings, parts)
        self.residual = parts.make_residual("parallel")

    def arrange(self, stream: Any, attend: Sublayer, cross_attend: Sublayer | None) -> Any:
        return self.residual(
            stream,
            lambda x, **given: attend(x, **given) + (cross_attend(x) if cross_attend else 0) + self.feedforward(x),
        )

    def residual_of(self, sublayer: str) -> Residual:
        return self.residual


class ParallelTwoNorms(ParallelBlock, name="parallel-two-norms"):
    """With Pre-LN, x + Attention(N₁(x)) + FeedForward(N₂(x)). Black et al. 2022 (GPT-NeoX, arXiv 2204.06745), 2.1."""

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__(settings, parts)
        self.feedforward_norm = parts.make_norm()

    def arrange(self, stream: Tensor, attend: Sublayer, cross_attend: Sublayer | None) -> Tensor:
        fed = self.feedforward(self.feedforward_norm(stream))
        return self.residual(
            stream, lambda x, **given: attend(x, **given) + (cross_attend(x) if cross_attend else 0) + fed
        )


def run_block(block: nn.Module, stream: Any, **context: Any) -> Any:
    """The stream after `block`; the backward pass finds what it needs in memory."""
    return block(stream, **context)


class Stack(nn.Module):
    """A stack of blocks, with positions, masks and embedding norm, computed once for all layers.

    `residual` is the norm placement. With `causal`, no token attends to a later one; in a layer with one of
    `windows`, only to tokens fewer positions away.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        positions: PositionScheme,
        residual: Chosen[Residual],
        make_norm: Callable[[], nn.Module],
        causal: bool,
        windows: Sequence[int | None],
        embedding_norm: bool = False,
        smear: TokenSmear | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.positions, self.smear = positions, smear
        self.embedding_norm = make_norm() if embedding_norm or residual.variant.has_embedding_norm else nn.Identity()
        places = [connection.place for connection in self.connections]
        self.shared = residual.variant.Shared(residual.settings, places)
        self.final_norm = residual.variant.make_final_norm(residual.settings, make_norm)
        self.dropout = Dropout(dropout)
        self.causal = causal
        self.windows = list(windows)
        self.run_block: Callable[..., Any] = run_block

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        *,
        positions: Int[Tensor, "#batch length"],
        is_token: Bool[Tensor, "batch length"] | None = None,
        documents: Int[Tensor, "batch length"] | None = None,
        memory: Memory | None = None,
        cache: KVCache | ChosenSlots | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The output of the last block for `x` at `positions`, which increase along a row or a document in it.

        Tokens attend to each other and to those in `cache`, to which they are added; `is_token` is False at
        padding. With `documents`, their numbers, they attend inside their own one only. Cross-attention sees `memory`.
        """
        slots = tokens_as_slots(positions, is_token) if cache is None else cache.reserve(positions, is_token)
        if self.smear is not None:
            x = self.smear(x, slots, cache and cache.embeddings)
        views = self._views(positions, slots, documents)
        stream = self.shared.open(self.dropout(self.embedding_norm(self.positions.embed(x, positions))))
        for layer, block in enumerate(self.blocks):
            stream = self.run_block(
                block,
                stream,
                view=views[layer],
                cache=cache and cache.layers[layer],
                memory=memory,
                memory_cache=cache and cache.memories[layer],
            )
        return self.shared.close(stream, self.final_norm)

    @property
    def connections(self) -> list[Residual]:
        """All residual connections, in order."""
        found = [branch.residual for block in self.blocks for branch in block.branches]  # type: ignore[union-attr]
        return list(dict.fromkeys(found))

    def _views(
        self, positions: Int[Tensor, "#batch query"], slots: Slots, documents: Int[Tensor, "batch length"] | None
    ) -> list[AttentionView]:
        """What attention in each layer sees; layers with one window and one rotation share their view."""
        bias = self.positions.score_bias(positions, slots.positions)
        rotations, places = self.positions.rotations(positions, self.windows)
        # Not by the rotations themselves: a compiler cannot compare functions.
        layers = list(zip(self.windows, places, strict=True))
        views = {
            (window, place): AttentionView(
                causal=self.causal and slots.in_order,
                mask=self._mask(positions, slots, window, documents),
                bias=bias,
                rotate=rotations[place],
                slots=slots,
            )
            for window, place in dict.fromkeys(layers)
        }
        return [views[layer] for layer in layers]

    def _mask(
        self,
        queries: Int[Tensor, "#batch query"],
        slots: Slots,
        window: int | None,
        documents: Int[Tensor, "batch length"] | None,
    ) -> Tensor | None:
        keys, masks = slots.positions, []
        if documents is not None:
            masks.append(document_mask(documents))
        if not slots.full:
            masks.append(padding_mask(keys >= 0))
        if self.causal and not slots.in_order:
            masks.append(causal_mask(queries, keys))
        if window is not None and window < slots.room:
            masks.append(sliding_window_mask(queries, keys, window))
        return reduce(and_, masks) if masks else None
