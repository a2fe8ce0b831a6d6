"""Single residual placements: the constants, initial weights and norms that their papers give them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minitransformer.architecture.attention import AttentionView
from minitransformer.architecture.norms import LayerNorm, Norm
from minitransformer.architecture.residual import DeepNorm, Place
from minitransformer.errors import UserError
from minitransformer.models.build import build_stack
from minitransformer.models.config import ModelConfig
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import build_model
from tests.placements_for_tests import Connections, by_hand


@pytest.mark.parametrize(
    ("place", "alpha", "beta"),
    [
        (Place(0, 100, "attention", d_model=1), 3.7606, 0.1880),
        (Place(0, 12, "attention", partner_layers=6, d_model=1), 1.6862, 0.4179),
        (Place(0, 6, "attention", partner_layers=12, has_memory=True, d_model=1), 2.0598, 0.3433),
    ],
)
def test_deepnorm_has_the_constants_of_its_paper(place: Place, alpha: float, beta: float) -> None:
    assert DeepNorm.constants(place) == pytest.approx((alpha, beta), abs=5e-5)


def weights_of(topology: str, **choices: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 7}
    return dict(build_model(ModelConfig(topology=topology, init="xavier", **sizes, **choices)).named_parameters())


@pytest.mark.parametrize("feedforward", ["gelu", "swiglu"])
@pytest.mark.parametrize("topology", ["decoder", "encoder", "encoder-decoder"])
def test_deepnorm_makes_all_matrices_smaller_but_those_of_queries_and_keys(topology: str, feedforward: str) -> None:
    plain = weights_of(topology, residual="post", feedforward=feedforward)
    scaled = weights_of(topology, residual="deepnorm", feedforward=feedforward)
    in_pair = topology == "encoder-decoder"
    assert plain.keys() == scaled.keys()
    for name, weight in plain.items():
        beta = (8 * 4) ** -0.25
        if in_pair:
            beta = 0.87 * (4**4 * 3) ** (-1 / 16) if name.startswith("encoder.") else (12 * 3) ** -0.25
        branch = ".blocks." in name and "_residual" not in name
        gain = beta if branch and not name.endswith(("query.weight", "key.weight")) else 1.0
        torch.testing.assert_close(scaled[name], gain * weight, rtol=1e-5, atol=0)


def test_b2t_makes_all_matrices_of_its_layers_smaller() -> None:
    plain, scaled = weights_of("decoder", residual="post"), weights_of("decoder", residual="b2t")
    for name, weight in plain.items():
        gain = 4**-0.5 if ".blocks." in name and "_residual" not in name else 1.0
        torch.testing.assert_close(scaled[name], gain * weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_admin_starts_with_the_deviations_of_pre_ln_s_stream_in_one_pass(dropout: float, shake: Any) -> None:
    connections = shake(Connections("admin", dropout=dropout)).double()
    with torch.no_grad():
        for connection in connections.residuals:
            connection.omega.fill_(1.0)
    x = 0.02 * torch.randn(4, 8, 6).double()
    torch.manual_seed(5)
    connections.shared.calibrate(list(connections.residuals), lambda: connections(x))
    torch.manual_seed(5)
    variance = 1.0
    for connection, f in zip(connections.residuals, connections.sublayers, strict=True):
        torch.testing.assert_close(connection.omega, torch.full_like(connection.omega, variance**0.5))
        branch = connection.dropout(f(x).tanh())
        variance = (connection.omega * x).var(correction=0).item() + branch.var(correction=0).item()
        x = by_hand(connection.norm)(connection.omega * x + branch)
    before = [connection.omega.clone() for connection in connections.residuals]
    connections(0.02 * torch.randn(4, 8, 6).double())
    assert all(torch.equal(a, c.omega) for a, c in zip(before, connections.residuals, strict=True))


def admin_decoder(dropout: float = 0.0, seed: int = 3, **choices: Any) -> DecoderLM:
    """A decoder with embeddings N(0, 0.02²), whose Admin saw a batch."""
    sizes: dict[str, Any] = {"d_model": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 50, "positions": "none"}
    torch.manual_seed(seed)
    model = build_model(ModelConfig(residual="admin", dropout=dropout, **sizes, **choices))
    tokens = torch.arange(64).reshape(4, 16).remainder(50)
    model.eval().calibrate(lambda: model(tokens))
    assert not model.training
    return model


def omegas(model: DecoderLM) -> list[float]:
    return [connection.omega[0].item() for connection in model.stack.connections]  # type: ignore[union-attr, operator]


def test_admin_s_second_gain_is_as_small_as_the_default_embeddings() -> None:
    first, second, third, *_ = omegas(admin_decoder())
    assert first == 1
    assert second == pytest.approx(0.02, rel=0.1)  # not 1: the stream that it scales starts with this deviation
    assert third < 0.03  # one branch of GPT-2's small weights later


def test_admin_is_profiled_with_dropout_and_alike_for_the_same_seed() -> None:
    dropped, whole = omegas(admin_decoder(dropout=0.5, init="xavier")), omegas(admin_decoder(init="xavier"))
    assert dropped == omegas(admin_decoder(dropout=0.5, init="xavier"))
    assert all(a > 1.1 * b for a, b in zip(dropped[1:], whole[1:], strict=True))


def test_keel_counts_a_parallel_block_once() -> None:
    """x ← N₂(αx + Attn(N₁ x) + FFN(N₁ x)): α residual connections, so many as the stack has layers."""
    sizes: dict[str, Any] = {"d_model": 8, "num_layers": 6, "num_heads": 2}
    for block, alpha in (("sequential", 12), ("parallel", 6)):
        stack = build_stack(ModelConfig(residual="keel", block=block, **sizes), causal=True)
        assert {connection.alpha for connection in stack.connections} == {alpha}
    decoder = build_stack(ModelConfig(residual="keel", block="parallel", **sizes), causal=True, has_memory=True)
    assert decoder.connections[0].alpha == 6


@pytest.mark.parametrize("name", ["residual", "residual-scaled"])
@pytest.mark.parametrize(("eps", "last"), [(1e-5, 1e-7), (1e-3, 1e-5)])
def test_the_last_norm_of_residual_has_a_hundredth_of_the_eps_of_all_others(name: str, eps: float, last: float) -> None:
    """1e-7 beside the 1e-5 of all others is what its authors released."""
    stack = build_stack(ModelConfig(d_model=8, num_heads=2, residual=name, norm=LayerNorm.choose(eps=eps)), causal=True)
    assert stack.final_norm.eps == pytest.approx(last)
    assert stack.connections[0].norm.eps == eps


@pytest.mark.parametrize("init", ["gpt2", "xavier-scaled"])
@pytest.mark.parametrize(("name", "gain"), [("deepnorm", (8 * 8) ** -0.25), ("b2t", 8**-0.5)])
def test_outputs_are_made_smaller_once_by_the_placement_or_by_the_initialisation(
    name: str, gain: float, init: str
) -> None:
    """DeepNorm's β and B2T's L^-½ are for matrices that depth has not made smaller already."""
    sizes: dict[str, Any] = {"d_model": 64, "num_layers": 8, "num_heads": 4}
    blocks = {
        residual: build_model(ModelConfig(residual=residual, init=init, vocab_size=7, **sizes)).stack.blocks  # type: ignore[union-attr]
        for residual in ("post", name)
    }
    plain = {"gpt2": 0.02, "xavier-scaled": 64**-0.5}[init]
    for part in ("output", "value"):
        deviation = torch.cat([getattr(block.attention, part).weight.flatten() for block in blocks[name]]).std().item()  # type: ignore[union-attr]
        assert deviation == pytest.approx(gain * plain, rel=0.03)
    assert blocks["post"][0].attention.output.weight.std().item() == pytest.approx(plain / 4, rel=0.1)  # type: ignore[union-attr, index]


def normalised_by(name: str, **choices: Any) -> list[int | None]:
    """How many features the norms of queries, keys and values take together in a model with four heads of 4 each."""
    sizes: dict[str, Any] = {"d_model": 16, "num_layers": 4, "num_heads": 4, "vocab_size": 7}
    model = build_model(ModelConfig(residual=name, **sizes, **choices))
    attention = model.stack.blocks[0].attention  # type: ignore[union-attr, index]
    norms = [attention.query_norm, attention.key_norm, attention.value_norm]
    return [next((part.weight.numel() for part in norm.modules() if isinstance(part, Norm)), None) for norm in norms]


@pytest.mark.parametrize("name", ["hybrid", "hybrid-star"])
def test_hybridnorm_normalises_queries_keys_and_values_by_head_unless_it_is_told_otherwise(name: str) -> None:
    assert normalised_by(name) == normalised_by(name, qk_norm="head") == [4, 4, 4]
    assert normalised_by(name, qk_norm="full") == [16, 16, 16]


def test_any_placement_can_normalise_values_as_queries_and_keys() -> None:
    assert normalised_by("pre") == [None] * 3
    assert normalised_by("pre", qk_norm="head") == [4, 4, None]
    assert normalised_by("pre", qk_norm="head", value_norm=True) == [4, 4, 4]
    assert normalised_by("post", qk_norm="full", value_norm=True) == [16, 16, 16]
    with pytest.raises(UserError, match="qk_norm 'head'"):
        ModelConfig(value_norm=True)


def test_attention_of_hybridnorm_is_that_of_its_authors(shake: Any) -> None:
    """q, k and v of each head through an RMS norm of its features, as in their dense_model/olmo/model.py."""
    config = ModelConfig(d_model=8, num_layers=1, num_heads=2, residual="hybrid", norm="rms", positions="none")
    attention = shake(build_stack(config, causal=True)).blocks[0].attention.double()
    x = torch.randn(1, 5, 8).double()
    attended = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (
            y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.norm.weight
            for y, norm in (
                (x @ attention.query.weight[part].T, attention.query_norm),
                (x @ attention.key.weight[part].T, attention.key_norm),
                (x @ attention.value.weight[part].T, attention.value_norm),
            )
        )
        scores = (q @ k.transpose(1, 2) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        attended.append(scores.softmax(-1) @ v)
    expected = torch.cat(attended, -1) @ attention.output.weight.T
    torch.testing.assert_close(attention(x, view=AttentionView(causal=True)), expected, rtol=1e-12, atol=1e-12)
