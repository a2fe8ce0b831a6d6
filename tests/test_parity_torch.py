"""Our modules against torch's own, with torch's weights in ours: values and gradients, in float32."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention
from minitransformer.architecture.block import Memory, Stack, TransformerBlock
from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.masks import causal_mask, padding_mask
from minitransformer.architecture.positions import token_positions
from minitransformer.models.build import build_stack
from minitransformer.models.config import ModelConfig

D, HEADS, D_FF, LENGTH = 16, 4, 24, 6
IS_TOKEN = torch.tensor([[True] * LENGTH, [True] * 4 + [False] * 2])
FUTURE = ~causal_mask(token_positions(LENGTH), token_positions(LENGTH))[0, 0]


def close(ours: Tensor, torchs: Tensor) -> None:
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


class Twins:
    """A module of ours and torch's, the weights of both in pairs: torch keeps some of ours in one matrix."""

    def __init__(self) -> None:
        self.pairs: list[tuple[list[Tensor], Tensor]] = []

    def alike(self, ours: Any, torchs: nn.Module) -> None:
        """Two linear maps, or two norms."""
        self.pairs += [([ours.weight], torchs.weight), ([ours.bias], torchs.bias)]

    def attention(self, ours: MultiHeadAttention, torchs: nn.MultiheadAttention) -> None:
        parts = [ours.query, ours.key, ours.value]
        self.pairs.append(([part.weight for part in parts], torchs.in_proj_weight))
        self.pairs.append(([part.bias for part in parts], torchs.in_proj_bias))
        self.alike(ours.output, torchs.out_proj)

    def layer(self, ours: TransformerBlock, torchs: Any) -> None:
        self.attention(ours.attention, torchs.self_attn)
        self.alike(ours.feedforward.up, torchs.linear1)
        self.alike(ours.feedforward.down, torchs.linear2)
        norms = [ours.attention_residual.norm, ours.feedforward_residual.norm]
        if ours.cross_attention is not None:
            self.attention(ours.cross_attention, torchs.multihead_attn)
            norms.insert(1, ours.cross_attention_residual.norm)
        for number, norm in enumerate(norms, start=1):
            self.alike(norm, getattr(torchs, f"norm{number}"))

    def stack(self, ours: Stack, torchs: Any) -> None:
        for block, layer in zip(ours.blocks, torchs.layers, strict=True):
            self.layer(block, layer)
        if torchs.norm is not None:
            self.alike(ours.final_norm, torchs.norm)

    @torch.no_grad()
    def share_weights(self) -> None:
        """Draw torch's weights, and copy them to ours."""
        for parts, whole in self.pairs:
            whole.normal_(std=0.5)
            for part, rows in zip(parts, whole.chunk(len(parts)), strict=True):
                part.copy_(rows)

    def compare(self, ours: Tensor, torchs: Tensor, inputs: list[Tensor]) -> None:
        """Both outputs, and the gradients of both for the inputs and for every weight, the largest being 1."""
        close(ours, torchs)
        pairs = [([x], x) for x in inputs] + self.pairs
        expected = torch.autograd.grad(torchs.sin().sum(), [whole for _, whole in pairs])
        actual = iter(torch.autograd.grad(ours.sin().sum(), [part for parts, _ in pairs for part in parts]))
        largest = max(gradient.abs().max() for gradient in expected)
        for (parts, _), gradient in zip(pairs, expected, strict=True):
            close(torch.cat([next(actual) for _ in parts]) / largest, gradient / largest)


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, D).requires_grad_()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("view", ["all", "causal", "mask", "padding", "causal and padding"])
@pytest.mark.parametrize("crossing", [False, True], ids=["self", "cross"])
def test_multi_head_attention_is_torchs(kernel: str, view: str, crossing: bool) -> None:
    theirs = nn.MultiheadAttention(D, HEADS, batch_first=True)
    ours = MultiHeadAttention(D, HEADS, kernel=KERNELS[kernel])
    twins = Twins()
    twins.attention(ours, theirs)
    twins.share_weights()
    x, memory = tokens(3 if crossing else LENGTH), tokens()
    source = memory if crossing else x
    inputs = [x, memory] if crossing else [x]
    queries = x.size(1)
    mask, forbidden = None, None
    if view == "mask":
        mask = (torch.rand(2, HEADS, queries, LENGTH) < 0.6) | torch.eye(queries, LENGTH).bool()
        forbidden = ~mask.flatten(0, 1)
    elif "causal" in view:
        forbidden = FUTURE[-queries:]
    if "padding" in view:
        mask = padding_mask(IS_TOKEN)
    attention_view = AttentionView(causal="causal" in view, mask=mask)
    padding = ~IS_TOKEN if "padding" in view else None
    expected, _ = theirs(x, source, source, attn_mask=forbidden, key_padding_mask=padding, need_weights=False)
    twins.compare(ours(x, memory if crossing else None, view=attention_view), expected, inputs)


def test_attention_without_biases_is_torchs(shake: Any) -> None:
    theirs = shake(nn.MultiheadAttention(D, HEADS, bias=False, batch_first=True))
    ours = MultiHeadAttention(D, HEADS, bias=False)
    for layer, weight in zip((ours.query, ours.key, ours.value), theirs.in_proj_weight.chunk(3), strict=True):
        layer.weight.data = weight
    ours.output.weight.data = theirs.out_proj.weight
    x = tokens()
    close(ours(x, view=AttentionView()), theirs(x, x, x)[0])


def stack_like(
    placement: str, activation: str, num_layers: int, *, causal: bool, dropout: float, has_memory: bool = False
) -> Stack:
    config = ModelConfig(
        d_model=D,
        num_layers=num_layers,
        num_heads=HEADS,
        d_ff=D_FF,
        residual=placement,
        positions="none",
        feedforward=activation,
        bias=True,
        dropout=dropout,
    )
    return build_stack(config, causal=causal, has_memory=has_memory)


def layer_like(placement: str, activation: str, dropout: float) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        D, HEADS, D_FF, dropout, activation, batch_first=True, norm_first=placement == "pre"
    )


@pytest.mark.parametrize("mode", ["training without dropout", "evaluation"])
@pytest.mark.parametrize(
    ("placement", "activation", "causal"), [*itertools.product(["pre", "post"], ["relu", "gelu"], [False, True])]
)
def test_a_block_is_torchs_encoder_layer(placement: str, activation: str, causal: bool, mode: str) -> None:
    dropout = 0.3 if mode == "evaluation" else 0.0
    theirs = layer_like(placement, activation, dropout).train(mode != "evaluation")
    ours = stack_like(placement, activation, 1, causal=causal, dropout=dropout).blocks[0].train(mode != "evaluation")
    twins = Twins()
    twins.layer(ours, theirs)
    twins.share_weights()
    x = tokens()
    forbidden = FUTURE if causal else None
    expected = theirs(x, src_mask=forbidden, src_key_padding_mask=~IS_TOKEN)
    view = AttentionView(causal=causal, mask=padding_mask(IS_TOKEN))
    twins.compare(ours(x, view=view)[IS_TOKEN], expected[IS_TOKEN], [x])


@pytest.mark.parametrize("mode", ["training without dropout", "evaluation"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_stack_is_torchs_encoder(placement: str, causal: bool, mode: str) -> None:
    dropout = 0.3 if mode == "evaluation" else 0.0
    final_norm = nn.LayerNorm(D) if placement == "pre" else None
    layer = layer_like(placement, "gelu", dropout)
    theirs = nn.TransformerEncoder(layer, 3, final_norm, enable_nested_tensor=False).train(mode != "evaluation")
    ours = stack_like(placement, "gelu", 3, causal=causal, dropout=dropout).train(mode != "evaluation")
    twins = Twins()
    twins.stack(ours, theirs)
    twins.share_weights()
    x = tokens()
    forbidden = FUTURE if causal else None
    expected = theirs(x, mask=forbidden, src_key_padding_mask=~IS_TOKEN)
    actual = ours(x, positions=token_positions(LENGTH), is_token=IS_TOKEN)
    twins.compare(actual[IS_TOKEN], expected[IS_TOKEN], [x])
    if mode == "evaluation":
        with torch.inference_mode():  # where torch takes a path of its own
            fast = theirs(x, mask=forbidden, src_key_padding_mask=~IS_TOKEN)
        close(actual[IS_TOKEN], fast[IS_TOKEN])


SOURCE_LENGTH = 5
SOURCE_IS_TOKEN = torch.tensor([[True] * 3 + [False] * 2, [True] * SOURCE_LENGTH])


@pytest.mark.parametrize("mode", ["training without dropout", "evaluation"])
@pytest.mark.parametrize(("placement", "activation"), [*itertools.product(["pre", "post"], ["relu", "gelu"])])
def test_a_block_with_a_memory_is_torchs_decoder_layer(placement: str, activation: str, mode: str) -> None:
    training = mode != "evaluation"
    dropout = 0.0 if training else 0.3
    theirs = nn.TransformerDecoderLayer(
        D, HEADS, D_FF, dropout, activation, batch_first=True, norm_first=placement == "pre"
    ).train(training)
    stack = stack_like(placement, activation, 1, causal=True, dropout=dropout, has_memory=True)
    ours = stack.blocks[0].train(training)
    twins = Twins()
    twins.layer(ours, theirs)
    twins.share_weights()
    x, source = tokens(), tokens(SOURCE_LENGTH)
    paddings = {"tgt_key_padding_mask": ~IS_TOKEN, "memory_key_padding_mask": ~SOURCE_IS_TOKEN}
    expected = theirs(x, source, tgt_mask=FUTURE, **paddings)
    view = AttentionView(causal=True, mask=padding_mask(IS_TOKEN))
    actual = ours(x, view=view, memory=Memory(source, SOURCE_IS_TOKEN))
    twins.compare(actual[IS_TOKEN], expected[IS_TOKEN], [x, source])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("mode", ["training without dropout", "evaluation"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_two_stacks_are_torchs_transformer(placement: str, mode: str) -> None:
    training = mode != "evaluation"
    dropout = 0.0 if training else 0.3
    theirs = nn.Transformer(D, HEADS, 2, 3, D_FF, dropout, batch_first=True, norm_first=placement == "pre")
    if placement == "post":  # torch's ends both stacks with a norm even where the last block does, unlike the paper
        theirs.encoder.norm = theirs.decoder.norm = None
    theirs.train(training)
    encoder = stack_like(placement, "relu", 2, causal=False, dropout=dropout).train(training)
    decoder = stack_like(placement, "relu", 3, causal=True, dropout=dropout, has_memory=True).train(training)
    twins = Twins()
    twins.stack(encoder, theirs.encoder)
    twins.stack(decoder, theirs.decoder)
    twins.share_weights()
    source, x = tokens(SOURCE_LENGTH), tokens()
    expected = theirs(
        source,
        x,
        tgt_mask=FUTURE,
        src_key_padding_mask=~SOURCE_IS_TOKEN,
        tgt_key_padding_mask=~IS_TOKEN,
        memory_key_padding_mask=~SOURCE_IS_TOKEN,
    )
    memory = Memory(
        encoder(source, positions=token_positions(SOURCE_LENGTH), is_token=SOURCE_IS_TOKEN), SOURCE_IS_TOKEN
    )
    actual = decoder(x, positions=token_positions(LENGTH), is_token=IS_TOKEN, memory=memory)
    twins.compare(actual[IS_TOKEN], expected[IS_TOKEN], [source, x])
