"""Transformer blocks, and the stack of blocks that is an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import and_
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention
from minitransformer.architecture.cache import KVCache, LayerCache, MemoryCache
from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.embeddings import TokenSmear
from minitransformer.architecture.masks import causal_mask, padding_mask, sliding_window_mask
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual
from minitransformer.registry import Registered


@dataclass(frozen=True)
class Memory:
    """What cross-attention attends to: the output of an encoder, and where its real tokens are (None: everywhere)."""

    values: Float[Tensor, "batch length d_model"]
    is_token: Bool[Tensor, "batch length"] | None = None

    @property
    def view(self) -> AttentionView:
        return AttentionView(mask=None if self.is_token is None else padding_mask(self.is_token))

    def select(self, rows: Int[Tensor, "selected"]) -> Memory:
        """The given rows of the batch, in their order."""
        return Memory(self.values[rows], None if self.is_token is None else self.is_token[rows])


Sublayer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of; `make_residual` takes the sublayer's name."""

    attention: MultiHeadAttention
    feedforward: nn.Module
    make_residual: Callable[[str], Residual]
    make_norm: Callable[[], nn.Module]
    cross_attention: MultiHeadAttention | None = None


@dataclass(frozen=True)
class Branch:
    """A sublayer by its name, "attention", "cross_attention" or "feedforward", and the connection that it stands in."""

    name: str
    sublayer: nn.Module
    residual: Residual


class Block(Registered, nn.Module, kind="block"):
    """How attention and the feed-forward network are arranged, each inside a residual connection."""

    is_parallel = False
    """whether one connection has all sublayers"""

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
        """The stream after this block; `memory` is what a block with cross-attention attends to."""
        attend = partial(self.attention, view=view, cache=cache)
        recall = None
        if self.cross_attention is not None:
            assert memory is not None, "cross-attention without a memory"
            recall = partial(self.cross_attention, memory=memory.values, view=memory.view, cache=memory_cache)
        return self.arrange(stream, attend, recall)

    def arrange(self, stream: Any, attend: Sublayer, recall: Sublayer | None) -> Any:
        """The stream after the sublayers: self-attention, cross-attention where there is one, feed-forward network."""
        raise NotImplementedError

    @property
    def branches(self) -> list[Branch]:
        """The sublayers in their order, for who initialises them or looks at them from outside."""
        sublayers = {name: getattr(self, name) for name in ("attention", "cross_attention", "feedforward")}
        return [Branch(name, part, self.residual_of(name)) for name, part in sublayers.items() if part is not None]

    def residual_of(self, sublayer: str) -> Residual:
        """The connection that the sublayer of this name stands in."""
        raise NotImplementedError


class TransformerBlock(Block, name="sequential"):
    """One sublayer after the other. Vaswani et al. 2017 (arXiv 1706.03762), section 3.1."""

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__(settings, parts)
        self.attention_residual = parts.make_residual("attention")
        if parts.cross_attention is not None:
            self.cross_attention_residual = parts.make_residual("cross_attention")
        self.feedforward_residual = parts.make_residual("feedforward")

    def arrange(self, stream: Any, attend: Sublayer, recall: Sublayer | None) -> Any:
        stream = self.attention_residual(stream, attend)
        if recall is not None:
            stream = self.cross_attention_residual(stream, recall)
        return self.feedforward_residual(stream, self.feedforward)

    def residual_of(self, sublayer: str) -> Residual:
        return getattr(self, f"{sublayer}_residual")


class ParallelBlock(Block, name="parallel"):
    """One sublayer that adds all: with Pre-LN, x + Attention(N(x)) + FeedForward(N(x)).

    Wang and Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 2.
    """

    is_parallel = True

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__(settings, parts)
        self.residual = parts.make_residual("parallel")

    def arrange(self, stream: Any, attend: Sublayer, recall: Sublayer | None) -> Any:
        return self.residual(stream, lambda x: attend(x) + (recall(x) if recall else 0) + self.feedforward(x))

    def residual_of(self, sublayer: str) -> Residual:
        return self.residual


class ParallelTwoNorms(ParallelBlock, name="parallel-two-norms"):
    """With Pre-LN, x + Attention(N₁(x)) + FeedForward(N₂(x)). Black et al. 2022 (GPT-NeoX, arXiv 2204.06745), 2.1."""

    def __init__(self, settings: Any, parts: BlockParts) -> None:
        super().__init__(settings, parts)
        self.feedforward_norm = parts.make_norm()

    def arrange(self, stream: Tensor, attend: Sublayer, recall: Sublayer | None) -> Tensor:
        fed = self.feedforward(self.feedforward_norm(stream))
        return self.residual(stream, lambda x: attend(x) + (recall(x) if recall else 0) + fed)


class Stack(nn.Module):
    """Embeddings with positions, through every block: what all layers share is made once here.

    `residual` is the placement of the blocks. With `causal`, no token sees a later one; in a layer that has one of
    `windows`, none sees a token that many or more positions away.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        positions: PositionScheme,
        residual: type[Residual],
        make_norm: Callable[[], nn.Module],
        causal: bool,
        windows: Sequence[int | None] | None = None,
        embedding_norm: bool = False,
        smear: TokenSmear | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.positions, self.smear = positions, smear
        self.embedding_norm = make_norm() if embedding_norm or residual.has_embedding_norm else nn.Identity()
        self.final_norm = residual.make_final_norm(make_norm)
        self.dropout = Dropout(dropout)
        self.residual, self.causal = residual, causal
        self.windows = list(windows or [None] * len(blocks))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        *,
        positions: Int[Tensor, "#batch all"],
        is_token: Bool[Tensor, "batch all"] | None = None,
        memory: Memory | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The output of the last block for `x`, the newest tokens.

        `positions` and `is_token` (False at padding) cover all tokens, those in the cache included. Blocks with
        cross-attention attend to `memory`.
        """
        slots = None if cache is None else cache.slots
        if self.smear is not None:
            x = self.smear(x, is_token, cache and cache.embeddings)
        new_positions = positions[:, -x.size(1) :] if slots is None else positions[:, slots]
        bias, rotate = self.positions.score_bias(new_positions, positions), self.positions.rotation(new_positions)
        views = {
            window: AttentionView(
                # Kernels know causality without a mask, if the queries are the last keys.
                causal=self.causal and slots is None,
                mask=self._mask(new_positions, positions, window, is_token, cache),
                bias=bias,
                rotate=rotate,
            )
            for window in set(self.windows)
        }
        stream = self.residual.open(self.dropout(self.embedding_norm(self.positions.embed(x, new_positions))))
        for layer, block in enumerate(self.blocks):
            stream = block(
                stream,
                view=views[self.windows[layer]],
                cache=cache and cache.layers[layer],
                memory=memory,
                memory_cache=cache and cache.memories[layer],
            )
        return self.residual.close(stream, self.final_norm)

    @property
    def connections(self) -> list[Residual]:
        """Every residual connection, in their order."""
        found = [branch.residual for block in self.blocks for branch in block.branches]  # type: ignore[union-attr]
        return list(dict.fromkeys(found))

    def _mask(
        self, new: Tensor, positions: Tensor, window: int | None, is_token: Tensor | None, cache: KVCache | None
    ) -> Tensor | None:
        # A number, which a size is not while torch records a step. That of the keys grows from replay to replay.
        queries, keys, device = int(new.size(1)), positions.size(1), positions.device
        placed = None if cache is None or cache.slots is None else cache
        slots, most = (None, keys) if placed is None else (placed.slots, placed.max_length)
        masks = []
        if is_token is not None:
            masks.append(padding_mask(is_token))
        if window is not None and window < most:
            masks.append(sliding_window_mask(queries, keys, window, device, slots=slots))
        if self.causal and placed is not None and not (queries == 1 and placed.newest_last):
            masks.append(causal_mask(queries, keys, device, slots=slots))
        return reduce(and_, masks) if masks else None
