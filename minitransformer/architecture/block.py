"""A transformer block, and the stack of blocks that is an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention
from minitransformer.architecture.cache import KVCache, LayerCache
from minitransformer.architecture.masks import padding_mask, sliding_window_mask
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual


class TransformerBlock(nn.Module):
    """Self-attention, then the feed-forward network, each inside its residual connection.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.1. `make_residual` takes the sublayer's name.
    """

    def __init__(
        self, attention: MultiHeadAttention, feedforward: nn.Module, make_residual: Callable[[str], Residual]
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feedforward = feedforward
        self.attention_residual = make_residual("attention")
        self.feedforward_residual = make_residual("feedforward")

    def forward(self, stream: Any, *, view: AttentionView, cache: LayerCache | None = None) -> Any:
        stream = self.attention_residual(stream, partial(self.attention, view=view, cache=cache))
        return self.feedforward_residual(stream, self.feedforward)


class Stack(nn.Module):
    """Embeddings with positions, through every block: what all layers share is made once here.

    `residual` is the placement of the blocks. With `causal`, no token sees a later one; with `window`, none sees a
    token `window` or more positions away.
    """

    def __init__(
        self,
        blocks: list[TransformerBlock],
        *,
        positions: PositionScheme,
        residual: type[Residual],
        make_norm: Callable[[], nn.Module],
        causal: bool,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.positions = positions
        self.final_norm = make_norm() if residual.has_final_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.residual, self.causal, self.window = residual, causal, window

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        *,
        positions: Int[Tensor, "#batch all"],
        is_token: Bool[Tensor, "batch all"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The output of the last block for `x`, the newest tokens.

        `positions` and `is_token` (False at padding) cover all tokens, those in the cache included.
        """
        new_positions = positions[:, -x.size(1) :]
        view = AttentionView(
            causal=self.causal,
            mask=self._mask(x, positions.size(1), is_token),
            bias=self.positions.score_bias(new_positions, positions),
            rotate=self.positions.rotation(new_positions),
        )
        stream = self.residual.open(self.dropout(self.positions.embed(x, new_positions)))
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            stream = block(stream, view=view, cache=layer_cache)
        return self.residual.close(stream, self.final_norm)

    def _mask(self, x: Tensor, keys: int, is_token: Tensor | None) -> Tensor | None:
        mask = None if is_token is None else padding_mask(is_token)
        if self.window is None or self.window >= keys:
            return mask
        window = sliding_window_mask(x.size(1), keys, self.window, x.device)
        return window if mask is None else mask & window
