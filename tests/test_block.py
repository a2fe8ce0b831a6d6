"""Blocks and stacks: what a block is made of, who sees whom in a stack, and what order means to an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention
from minitransformer.architecture.block import BlockParts, Stack, TransformerBlock
from minitransformer.architecture.feedforward import FeedForward
from minitransformer.architecture.norms import LayerNorm, RMSNorm
from minitransformer.architecture.positions import PositionScheme, token_positions
from minitransformer.architecture.residual import Place, PreLN, Residual
from minitransformer.models.build import build_stack
from minitransformer.models.config import ModelConfig
from tests.placements_for_tests import choosing

every_placement = pytest.mark.parametrize("residual", Residual.registry)
every_scheme = pytest.mark.parametrize("positions", PositionScheme.registry)


@pytest.fixture(scope="session")
def tiny_stack(shake: Any) -> Any:
    def make(causal: bool, **choices: Any) -> Stack:
        sizes = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context_length": 32}
        return shake(build_stack(ModelConfig(**{**sizes, **choices}), causal=causal)).double().eval()

    return make


def sensitivity(stack: Stack, length: int, is_token: Tensor | None = None) -> Tensor:
    """Whether output i depends on input j at all, by the gradient: [output, input]."""
    x = torch.randn(1, length, 16).double().requires_grad_()
    y = stack(x, positions=token_positions(length), is_token=is_token)
    rows = [torch.autograd.grad(y[0, i].sin().sum(), x, retain_graph=True)[0][0].ne(0).any(-1) for i in range(length)]
    return torch.stack(rows)


def test_a_block_is_attention_and_then_feed_forward_each_in_its_residual_connection(shake: Any) -> None:
    asked: list[str] = []

    def make_residual(sublayer: str) -> Residual:
        asked.append(sublayer)
        return PreLN.choose().make(lambda: LayerNorm.choose().make(8), 0.0, Place(0, 1, sublayer, d_model=8))

    parts = BlockParts(
        MultiHeadAttention(8, 2), FeedForward.choose("gelu").make(8), make_residual, lambda: LayerNorm.choose().make(8)
    )
    block = shake(TransformerBlock.choose().make(parts))
    x, view = torch.randn(2, 5, 8), AttentionView(causal=True)
    middle = x + block.attention(block.attention_residual.norm(x), view=view)
    expected = middle + block.feedforward(block.feedforward_residual.norm(middle))
    torch.testing.assert_close(block(x, view=view), expected)
    assert asked == ["attention", "feedforward"]


@every_placement
def test_an_encoder_without_positions_is_permutation_equivariant(residual: str, tiny_stack: Any) -> None:
    stack = tiny_stack(causal=False, positions="none", **choosing(residual))
    x, order = torch.randn(2, 7, 16).double(), torch.randperm(7)
    y = stack(x, positions=token_positions(7))
    torch.testing.assert_close(stack(x[:, order], positions=token_positions(7)), y[:, order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", [name for name in PositionScheme.registry if name != "none"])
def test_an_encoder_with_positions_is_not(positions: str, tiny_stack: Any) -> None:
    stack = tiny_stack(causal=False, positions=positions)
    x, order = torch.randn(2, 7, 16).double(), torch.tensor([1, 0, 2, 3, 4, 6, 5])
    y = stack(x, positions=token_positions(7))
    assert not torch.allclose(stack(x[:, order], positions=token_positions(7)), y[:, order], atol=1e-3)


@every_scheme
def test_every_output_of_an_encoder_depends_on_every_input(positions: str, tiny_stack: Any) -> None:
    assert sensitivity(tiny_stack(causal=False, positions=positions), 6).all()


@every_scheme
@every_placement
def test_an_output_of_a_decoder_depends_on_all_inputs_so_far_and_on_none_ahead(
    residual: str, positions: str, tiny_stack: Any
) -> None:
    depends = sensitivity(tiny_stack(causal=True, positions=positions, **choosing(residual)), 6)
    assert torch.equal(depends, torch.ones(6, 6).tril().bool())


@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=10)
@given(window=st.integers(1, 5), num_layers=st.integers(1, 3))
def test_each_layer_of_a_window_of_w_reaches_w_minus_1_tokens_further_and_no_more(
    causal: bool, window: int, num_layers: int, tiny_stack: Any
) -> None:
    stack = tiny_stack(causal=causal, attention_window=window, num_layers=num_layers)
    reach = num_layers * (window - 1)
    distance = torch.arange(8)[:, None] - torch.arange(8)
    expected = distance.abs() <= reach
    assert torch.equal(sensitivity(stack, 8), expected & (distance >= 0) if causal else expected)


def test_no_output_depends_on_padding_in_an_encoder(tiny_stack: Any) -> None:
    is_token = torch.tensor([[True, False, True, True, False]])
    depends = sensitivity(tiny_stack(causal=False), 5, is_token)
    assert depends[is_token[0]].equal(is_token.expand(3, 5))


def test_a_stack_embeds_positions_drops_runs_its_blocks_and_closes(tiny_stack: Any) -> None:
    stack = tiny_stack(causal=True, positions="learned", num_layers=3)
    x, positions = torch.randn(2, 5, 16).double(), token_positions(5)
    y = x + stack.positions.table(positions)
    for block in stack.blocks:
        y = block(y, view=AttentionView(causal=True))
    torch.testing.assert_close(stack(x, positions=positions), stack.final_norm(y))


def test_a_stack_drops_embeddings_in_training(tiny_stack: Any) -> None:
    stack = tiny_stack(causal=True, positions="none", dropout=0.4).train()
    seen: list[Tensor] = []
    stack.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    stack(torch.ones(8, 32, 16).double(), positions=token_positions(32))
    assert seen[0].eq(0).double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert seen[0].max().item() == pytest.approx(1 / 0.6, rel=1e-4)


def test_every_choice_of_a_config_reaches_its_part() -> None:
    config = ModelConfig(
        d_model=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        d_ff=20,
        context_length=9,
        residual="residual",
        norm=RMSNorm.choose(eps=0.25),
        positions="learned",
        feedforward="swiglu",
        bias=False,
        qk_norm="head",
        attention_scale=0.5,
        attention_window=4,
        attention_kernel="by-hand",
        dropout=0.125,
    )
    stack = build_stack(config, causal=True)
    assert len(stack.blocks) == 3
    assert (stack.causal, stack.windows, stack.dropout.p) == (True, [4, 4, 4], 0.125)
    assert stack.positions.table.weight.shape == (9, 12)
    assert not any(name.endswith("bias") for name, _ in stack.named_parameters())
    for block in stack.blocks:
        attention = block.attention
        assert attention.query.weight.shape == (24, 12)
        assert attention.key.weight.shape == attention.value.weight.shape == (12, 12)
        assert attention.query_norm.norm.weight.shape == attention.key_norm.norm.weight.shape == (6,)
        assert (attention.scale, attention.dropout) == (0.5, 0.125)
        assert attention.kernel.__name__ == "scaled_dot_product_attention"
        assert block.feedforward.gate.weight.shape == (20, 12)
        for connection in (block.attention_residual, block.feedforward_residual):
            assert connection.name == "residual"
            assert connection.dropout.p == 0.125
    norms = [module for module in stack.modules() if type(module).__name__ == "RMSNorm"]
    assert len(norms) == 3 * 4 + 1
    assert {norm.eps for norm in norms if norm is not stack.final_norm} == {0.25}


def test_biases_stand_where_a_config_asks_for_them() -> None:
    config = ModelConfig(d_model=12, num_heads=2, num_layers=1, bias=True, feedforward="swiglu")
    stack = build_stack(config, causal=True)
    for module in stack.modules():
        if isinstance(module, (nn.Linear, LayerNorm)):
            assert module.bias is not None
