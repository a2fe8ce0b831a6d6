"""Build the components of a model from its `ModelConfig`; no component reads the configuration itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from minitransformer.architecture.attention import QK_NORMS, MultiHeadAttention
from minitransformer.architecture.block import Block, BlockParts, Stack
from minitransformer.architecture.embeddings import (
    ClassificationHead,
    LMHead,
    TokenEmbedding,
    TokenSmear,
    TransformedHead,
)
from minitransformer.architecture.feedforward import MixtureOfExperts
from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme, PositionSpace
from minitransformer.architecture.residual import Place, Residual
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.joined import project_together


def build_stack(
    config: ModelConfig,
    *,
    causal: bool,
    num_layers: int | None = None,
    partner_layers: int = 0,
    has_memory: bool = False,
) -> Stack:
    """The blocks that `config` describes, with positions and norms; with `has_memory`, they have cross-attention.

    In an encoder-decoder, `partner_layers` are the layers of the other stack.
    """
    num_layers = num_layers or config.num_layers

    def make_residual(layer: int, sublayer: str) -> Residual:
        place = Place(layer, num_layers, sublayer, partner_layers, has_memory, d_model=config.d_model)
        is_normalised = place.index == 0 and not config.first_norm
        return config.residual.make(nn.Identity if is_normalised else partial(_norm, config), config.dropout, place)

    def make_block(layer: int) -> Block:
        return config.block.make(_block_parts(config, partial(make_residual, layer), has_memory=has_memory))

    return Stack(
        [make_block(layer) for layer in range(num_layers)],
        positions=_positions(config, causal=causal),
        residual=config.residual,
        make_norm=partial(_norm, config),
        causal=causal,
        windows=[config.window_of(layer) for layer in range(num_layers)],
        embedding_norm=config.embedding_norm,
        smear=TokenSmear(config.d_model) if config.token_smear else None,
        dropout=config.dropout,
    )


def build_embedding(config: ModelConfig, vocab_size: int | None) -> TokenEmbedding:
    """The token embedding; raises `UserError` if `vocab_size` is None."""
    if vocab_size is None:
        raise UserError("vocab_size is not set: give the tokenizer's vocabulary size")
    return TokenEmbedding(
        vocab_size,
        config.d_model,
        scale=config.embedding_scale * (config.d_model**0.5 if config.scaled_embeddings else 1.0),
        num_segments=config.num_segments,
        embedding_dim=config.embedding_dim,
    )


def build_head(config: ModelConfig, embedding: TokenEmbedding) -> nn.Module:
    """The language-model head, tied to `embedding` if `config` says so."""
    vocab_size, features = embedding.table.weight.shape
    head = LMHead(
        features,
        vocab_size,
        tied_to=embedding if config.tied_embeddings else None,
        bias=config.head_bias,
        scale=config.logit_scale,
        softcap=config.logit_softcap,
    )
    if config.embedding_dim is not None:
        return nn.Sequential(nn.Linear(config.d_model, features, bias=False), head)
    if config.head == "linear":
        return head
    activation = config.feedforward.variant.activation
    bias, norm = config.transform_bias, _norm(config)
    return TransformedHead(config.d_model, head, activation=activation, norm=norm, bias=bias)


def build_classification_head(config: ModelConfig, *, pooled: str) -> ClassificationHead:
    """The head of a classifier, which reads the hidden states by the pooling `pooled`."""
    assert config.num_classes is not None
    return ClassificationHead(
        config.d_model,
        config.num_classes,
        pooled=pooled,
        pooling=config.pooling,
        norm=_norm(config) if config.pooled_norm else None,
        bias=config.transform_bias,
        dropout=config.dropout,
    )


def _block_parts(config: ModelConfig, make_residual: Callable[[str], Residual], *, has_memory: bool) -> BlockParts:
    return BlockParts(
        attention=_attention(config),
        cross_attention=_attention(config) if has_memory else None,
        feedforward=_feedforward(config),
        make_residual=make_residual,
        make_norm=partial(_norm, config),
    )


def _norm(config: ModelConfig, features: int | None = None) -> Norm:
    return config.norm.make(features or config.d_model, bias=config.bias)


def _attention(config: ModelConfig) -> MultiHeadAttention:
    placement, qk_norm = config.residual.variant, config.qk_norm
    if placement.has_qkv_norm and qk_norm == "none":
        qk_norm = placement.asks_for["qk_norm"]
    value_norm = qk_norm if config.value_norm or placement.has_qkv_norm else "none"
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.features_per_head,
        bias=config.bias if config.qkv_bias is None else config.qkv_bias,
        output_bias=config.bias if config.attention_output_bias is None else config.attention_output_bias,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        clip=config.qkv_clip,
        dropout=config.dropout,
        make_norm=_qk_norm(config, qk_norm),
        make_value_norm=_qk_norm(config, value_norm),
        kernel=KERNELS[config.attention_kernel],
        project=project_together,
    )


def _qk_norm(config: ModelConfig, name: str) -> Callable[[int], nn.Module] | None:
    """What makes the norm of queries, keys or values; where each head has its own, it has no biases, as published."""
    settings, of_each = config.norm.settings, name == "each-head"
    if of_each and hasattr(settings, "bias"):
        settings = replace(settings, bias=False)
    make_norm = partial(config.norm.variant, settings, bias=config.bias and not of_each)
    return QK_NORMS[name](make_norm, config.features_per_head)


def _feedforward(config: ModelConfig) -> nn.Module:
    make = partial(config.feedforward.make, config.d_model, config.d_ff, bias=config.bias)
    if config.num_experts is None:
        return make()
    return MixtureOfExperts(
        make, config.d_model, num_experts=config.num_experts, experts_per_token=config.experts_per_token
    )


def _positions(config: ModelConfig, *, causal: bool) -> PositionScheme:
    heads, head_dim = config.num_heads, config.features_per_head
    return config.positions.make(PositionSpace(config.d_model, heads, head_dim, config.context_length, causal))
