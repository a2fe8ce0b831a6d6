"""From a `ModelConfig` to the parts of a model: the only place where the two meet."""

from __future__ import annotations

from functools import partial

from minitransformer.architecture.attention import KERNELS, MultiHeadAttention
from minitransformer.architecture.block import Stack, TransformerBlock
from minitransformer.architecture.feedforward import FEEDFORWARDS
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme, PositionSpace
from minitransformer.architecture.residual import Place, Residual
from minitransformer.models.config import ModelConfig


def build_stack(config: ModelConfig, *, causal: bool) -> Stack:
    """The blocks that `config` describes, with its positions and norms."""
    make_norm = partial(Norm.named(config.norm), eps=config.norm_eps, bias=config.bias)
    placement = Residual.named(config.residual)
    blocks = []
    for layer in range(config.num_layers):
        attention = MultiHeadAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.features_per_head,
            bias=config.bias,
            scale=config.attention_scale,
            dropout=config.dropout,
            make_norm=make_norm if config.qk_norm else None,
            kernel=KERNELS[config.attention_kernel],
        )
        feedforward = FEEDFORWARDS[config.feedforward](config.d_model, config.d_ff, bias=config.bias)

        def make_residual(sublayer: str, layer: int = layer) -> Residual:
            place = Place(layer, config.num_layers, sublayer)
            return placement(lambda: make_norm(config.d_model), config.dropout, place)

        blocks.append(TransformerBlock(attention, feedforward, make_residual))
    space = PositionSpace(config.d_model, config.num_heads, config.features_per_head, config.context_length, causal)
    return Stack(
        blocks,
        positions=PositionScheme.named(config.positions)(space),
        residual=placement,
        make_norm=lambda: make_norm(config.d_model),
        causal=causal,
        window=config.attention_window,
        dropout=config.dropout,
    )
