"""Diagnostics say what an independent computation says, on every placement, and leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minitransformer.architecture.attention import AttentionView, MultiHeadAttention
from minitransformer.architecture.block import Block
from minitransformer.architecture.residual import Residual
from minitransformer.diagnostics import Diagnostic, probe
from minitransformer.diagnostics.attention import captured_attention
from minitransformer.diagnostics.gradients import spikes
from minitransformer.diagnostics.streams import angular_distance
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model
from tests.placements_for_tests import choosing

TOPOLOGIES = ("decoder", "encoder", "encoder-decoder")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 0]])
TARGETS = TOKENS.roll(1, dims=0)


def make(topology: str = "decoder", **choices: Any) -> Model:
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "context_length": 8, "vocab_size": 11}
    return build_model(ModelConfig(**{**sizes, "topology": topology, "positions": "none", **choices})).double()


def loss_of(model: Model, rows: slice = slice(None)) -> Callable[[], Tensor]:
    texts = [TOKENS[rows]] * (2 if model.config.topology == "encoder-decoder" else 1)
    return lambda: F.cross_entropy(model(*texts).flatten(0, 1), TARGETS[rows].flatten())


def figures(model: Model, *names: str) -> dict[str, float]:
    found = probe(model, loss_of(model), names, examples=[loss_of(model, slice(i, i + 1)) for i in range(2)])
    return {key: math.nan if value is None else value for key, value in found.items()}


def streams_by_hand(model: Any) -> list[Any]:
    """The stream before the first layer and after each, of a decoder without positions."""
    with torch.no_grad():
        streams = [model.stack.shared.open(model.stack.embedding_norm(model.embedding(TOKENS)))]
        for block in model.stack.blocks:
            streams.append(block(streams[-1], view=AttentionView(causal=True)))
    return streams


def states_by_hand(model: Any) -> list[np.ndarray[Any, Any]]:
    return [model.stack.shared.state(stream).flatten(0, 1).numpy() for stream in streams_by_hand(model)]


def norm_by_hand(parameters: Any) -> float:
    return float(np.linalg.norm(np.concatenate([p.grad.numpy().ravel() for p in parameters])))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("residual", Residual.registry)
def test_every_diagnostic_measures_every_placement_in_every_topology(residual: str, topology: str) -> None:
    found = figures(make(topology, **choosing(residual)), *Diagnostic.registry)
    assert all(math.isfinite(value) for value in found.values())
    stacks = ["encoder", "decoder"] if topology == "encoder-decoder" else ["stack"]
    for name in ("skipped-layer", "stream-variance", "angular-distance", "representation-change", "fp16-margin"):
        for place in (f"{stack}.{layer}" for stack in stacks for layer in range(2)):
            assert f"{name}/{place}" in found
    for name in ("gradient-norm", "example-gradient-norm", "attention-entropy"):
        assert f"{name}/{stacks[-1]}.1.attention" in found
    assert ("attention-entropy/decoder.0.cross_attention" in found) == (topology == "encoder-decoder")


@pytest.mark.parametrize("block", Block.registry)
def test_every_arrangement_of_sublayers_is_measured_by_sublayer(block: str) -> None:
    found = figures(make(block=block), *Diagnostic.registry)
    connections = {key for key in found if key.startswith("representation-change/stack.0.")}
    assert len(connections) == (2 if block == "sequential" else 1)
    for place in ("stack.0.attention", "stack.1.feedforward"):
        assert found[f"gradient-norm/{place}"] > 0
        assert found[f"fp16-margin/{place}"] > 0


def test_the_gradient_norm_is_that_of_the_mean_loss(shake: Any) -> None:
    model = shake(make())
    found = figures(model, "gradient-norm")
    loss_of(model)().backward()
    for layer, block in enumerate(model.stack.blocks):  # type: ignore[union-attr, arg-type]
        for name in ("attention", "feedforward"):
            expected = norm_by_hand(getattr(block, name).parameters())
            assert found[f"gradient-norm/stack.{layer}.{name}"] == pytest.approx(expected, rel=1e-9)


def test_the_example_gradient_norm_is_the_mean_over_backward_passes_of_each_example(shake: Any) -> None:
    model: Any = shake(make())
    found = figures(model, "example-gradient-norm")
    norms = []
    for row in range(2):
        model.zero_grad()
        loss_of(model, slice(row, row + 1))().backward()
        norms.append(norm_by_hand(model.stack.blocks[1].feedforward.parameters()))
    assert found["example-gradient-norm/stack.1.feedforward"] == pytest.approx(np.mean(norms), rel=1e-9)


@given(seed=st.integers(0, 2**32))
def test_the_norm_of_the_mean_is_never_above_the_mean_of_norms(seed: int) -> None:
    torch.manual_seed(seed)
    found = figures(make(num_layers=1), "gradient-norm", "example-gradient-norm")
    for sublayer in ("attention", "feedforward"):
        mean_of_norms = found[f"example-gradient-norm/stack.0.{sublayer}"]
        assert found[f"gradient-norm/stack.0.{sublayer}"] <= mean_of_norms * (1 + 1e-9)


def test_a_frozen_sublayer_has_no_gradient_to_measure() -> None:
    model: Any = make()
    model.stack.blocks[0].attention.requires_grad_(False)
    found = figures(model, "gradient-norm")
    assert "gradient-norm/stack.0.attention" not in found
    assert found["gradient-norm/stack.1.attention"] > 0


@pytest.mark.parametrize("residual", ["pre", "post", "residual"])
def test_stream_figures_agree_with_numpy_on_streams_by_hand(residual: str, shake: Any) -> None:
    def layer_norm(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    model = shake(make(residual=residual))
    found = figures(model, "stream-variance", "representation-change", "angular-distance", "outlier-ratio")
    states = states_by_hand(model)
    assert found["stream-variance/stack.input"] == pytest.approx(np.mean((states[0] ** 2).sum(-1)), rel=1e-9)
    for layer, (before, after) in enumerate(pairwise(states)):
        square = np.mean((after**2).sum(-1))
        omega = np.mean(((layer_norm(after) - layer_norm(before)) ** 2).sum(-1)) / 16
        cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
        # torch's median of an even number of values is the lower of the two in the middle.
        outlier = np.abs(after).max() / np.sort(np.abs(after).ravel())[after.size // 2 - 1]
        assert found[f"stream-variance/stack.{layer}"] == pytest.approx(square, rel=1e-9)
        assert found[f"representation-change/stack.{layer}"] == pytest.approx(omega, rel=1e-6)
        assert found[f"angular-distance/stack.{layer}"] == pytest.approx(np.mean(np.arccos(cosine)) / np.pi, rel=1e-6)
        assert found[f"outlier-ratio/stack.{layer}"] == pytest.approx(outlier, rel=1e-9)


def test_the_last_connection_of_a_layer_ends_where_the_layer_ends(shake: Any) -> None:
    found = figures(shake(make(num_layers=1, feedforward="relu")), "representation-change")
    model = shake(make(num_layers=1))
    nn.init.zeros_(model.stack.blocks[0].feedforward.down.weight)  # type: ignore[union-attr, index]
    silent = figures(model, "representation-change")
    assert found["representation-change/stack.0.feedforward"] > 0
    assert silent["representation-change/stack.0.feedforward"] == 0
    assert silent["representation-change/stack.0"] == silent["representation-change/stack.0.attention"]


@given(angle=st.floats(0, math.pi), scale=st.floats(1e-3, 1e3))
def test_the_angular_distance_is_the_angle_whatever_the_lengths(angle: float, scale: float) -> None:
    before = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    after = scale * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert angular_distance(before, after) == pytest.approx(angle / math.pi, abs=1e-12)


def test_the_fp16_margin_counts_every_part_of_the_stream(shake: Any) -> None:
    model = shake(make(residual="residual"))
    largest = max(float(part.abs().max()) for part in streams_by_hand(model)[2])
    found = figures(model, "fp16-margin")["fp16-margin/stack.1"]
    assert found == pytest.approx(65504 / largest, rel=1e-6)
    assert largest > float(streams_by_hand(model)[2][0].abs().max())  # it is in y, the sum


def test_leaving_out_a_layer_that_adds_nothing_costs_nothing(shake: Any) -> None:
    model: Any = shake(make(num_layers=3, residual="pre"))
    for branch in model.stack.blocks[1].branches:
        for parameter in branch.sublayer.parameters():
            nn.init.zeros_(parameter)
    found = figures(model, "skipped-layer")
    assert found["skipped-layer/stack.1"] == 0
    assert found["skipped-layer/stack.0"] != 0
    assert found["skipped-layer/stack.2"] != 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("residual", ["pre", "residual", "b2t"])
def test_a_skipped_layer_is_a_model_without_it(residual: str, topology: str, shake: Any) -> None:
    model = shake(make(topology, num_layers=3, residual=residual))
    found = figures(model, "skipped-layer")
    with torch.no_grad():
        whole = loss_of(model)()
        for place in (key.removeprefix("skipped-layer/") for key in found):
            name, layer = place.split(".")
            stack: Any = model.get_submodule(name)
            blocks = stack.blocks
            stack.blocks = nn.ModuleList(block for number, block in enumerate(blocks) if number != int(layer))
            assert found[f"skipped-layer/{place}"] == pytest.approx(float(loss_of(model)() - whole), abs=1e-12)
            stack.blocks = blocks


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_uniform_attention_has_the_entropy_log_keys(topology: str) -> None:
    model = make(topology)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            nn.init.zeros_(module.query.weight)
    for key, value in figures(model, "attention-entropy").items():
        causal = key in ("attention-entropy/stack.0.attention", "attention-entropy/stack.1.attention") and (
            topology == "decoder"
        )
        causal = causal or (key.startswith("attention-entropy/decoder") and not key.endswith("cross_attention"))
        expected = np.mean(np.log(np.arange(1, 9))) if causal else math.log(8)
        assert value == pytest.approx(expected, rel=1e-6), key


def test_attention_to_equal_tokens_alone_has_the_entropy_of_their_number() -> None:
    """Sharp scores without positions: each token sees its like, of which half of the tokens have one."""
    model: Any = make("encoder", num_layers=1, head_dim=16, num_heads=1)
    with torch.no_grad():
        for projection in (model.stack.blocks[0].attention.query, model.stack.blocks[0].attention.key):
            projection.weight.copy_(1e3 * torch.eye(16, dtype=torch.float64))
    assert figures(model, "attention-entropy")["attention-entropy/stack.0.attention"] == pytest.approx(math.log(2) / 2)


def test_padding_changes_no_figure(shake: Any) -> None:
    names = [name for name in Diagnostic.registry if name != "fp16-margin"]  # padding overflows too
    model = shake(make("encoder", num_layers=2))
    row, is_token = TOKENS[:1], torch.arange(12)[None] < 8
    padded = F.pad(row, (0, 4))
    plain = probe(model, lambda: F.cross_entropy(model(row)[0], TARGETS[0]), names)
    among_padding = probe(model, lambda: F.cross_entropy(model(padded, is_token=is_token)[0, :8], TARGETS[0]), names)
    assert plain == pytest.approx(among_padding, rel=1e-6)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_looking_leaves_no_trace(topology: str) -> None:
    def hooks(module: nn.Module) -> int:
        return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)

    model = make(topology, dropout=0.5).train()
    model.get_submodule("embedding").eval()
    traces = [{**vars(module), "hooks": hooks(module)} for module in model.modules()]
    weights, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    first = figures(model, *Diagnostic.registry)
    assert [{**vars(module), "hooks": hooks(module)} for module in model.modules()] == traces
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))
    assert torch.equal(random, torch.get_rng_state())
    assert figures(model, *Diagnostic.registry) == first


def test_a_model_is_as_before_after_a_pass_that_fails() -> None:
    model = make()
    kernels = [module.kernel for module in model.modules() if isinstance(module, MultiHeadAttention)]

    def fail() -> Tensor:
        model(TOKENS)
        raise RuntimeError

    for name in ("stream-variance", "attention-entropy", "skipped-layer"):
        with pytest.raises(RuntimeError):
            probe(model, fail, [name])
    assert [module.kernel for module in model.modules() if isinstance(module, MultiHeadAttention)] == kernels
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_a_figure_that_is_not_finite_is_none() -> None:
    model = make()
    with torch.no_grad():
        next(model.get_submodule("embedding").parameters()).fill_(math.inf)
    assert set(probe(model, loss_of(model), ["stream-variance"]).values()) == {None}


def test_an_unknown_diagnostic_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown diagnostic 'gradientnorm': did you mean 'gradient-norm'"):
        probe(make(), loss_of(make()), ["gradientnorm"])


def test_a_spike_is_above_five_times_the_trailing_median() -> None:
    calm = [1.0, 1.2, 0.8] * 4
    assert spikes([*calm, 4.9, 5.1, 1.0, 6.0, 1.0]) == [*[False] * 13, True, False, True, False]


@given(level=st.floats(1e-6, 1e6), factor=st.floats(0, 4.9), length=st.integers(0, 80))
def test_steady_norms_have_no_spikes_and_broken_ones_always_do(level: float, factor: float, length: int) -> None:
    assert not any(spikes([level] * length + [factor * level]))
    assert spikes([level] * length + [math.nan, math.inf])[-2:] == [True, True]


def test_only_the_last_fifty_norms_are_compared() -> None:
    assert spikes([100.0] * 60 + [1.0] * 26 + [6.0])[-1]
    assert not spikes([100.0] * 60 + [1.0] * 24 + [6.0])[-1]


@pytest.mark.parametrize("kernel", ["by-hand", "fused"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_captured_attention_is_what_the_heads_did(topology: str, kernel: str, shake: Any) -> None:
    """Its product with the values, by the output projection, is what attention returned."""
    model: Any = shake(make(topology, attention_kernel=kernel, num_kv_heads=1)).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            module.value.register_forward_hook(lambda m, i, o, n=name: seen.update({n: (o, seen.get(n, (o, o))[1])}))
            module.register_forward_hook(lambda m, i, o, n=name: seen.update({n: (seen[n][0], o)}))
    with captured_attention(model) as maps:
        loss_of(model)()
    assert maps.keys() == seen.keys()
    for name, weights in maps.items():
        assert weights.shape == (2, 2, 8, 8)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 8, dtype=torch.float64))
        values, output = seen[name]
        attended = (weights @ values[:, None]).transpose(1, 2).flatten(2)
        assert torch.allclose(model.get_submodule(name).output(attended), output, atol=1e-6)
