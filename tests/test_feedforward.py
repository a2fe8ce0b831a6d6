"""Feed-forward networks: every activation against its formula, plain and gated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minitransformer.architecture.feedforward import FeedForward, ReGLU, ReLU
from minitransformer.architecture.linear import OutputProjection


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def relu(x: float) -> float:
    return x if x > 0 else 0.0


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x * sigmoid(x)


PLAIN: dict[str, Callable[[float], float]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu-tanh": gelu_tanh,
    "silu": silu,
    "squared-relu": lambda x: relu(x) ** 2,
}
GATED: dict[str, Callable[[float], float]] = {
    "glu": sigmoid,
    "reglu": relu,
    "geglu": gelu,
    "geglu-tanh": gelu_tanh,
    "swiglu": silu,
}


def elementwise(function: Callable[[float], float], x: Tensor) -> Tensor:
    return x.detach().clone().apply_(function)


def affine(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return torch.einsum("bld,fd->blf", x, layer.weight) + (0 if layer.bias is None else layer.bias)


def test_every_feed_forward_network_has_its_formula_here() -> None:
    assert set(FeedForward.registry) == {*PLAIN, *GATED}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_is_act_of_x_w1_plus_b1_times_w2_plus_b2(name: str, bias: bool, shake: Any) -> None:
    network, x = shake(FeedForward.choose(name).make(6, 10, bias=bias)).double(), 2 * torch.randn(2, 3, 6).double()
    expected = affine(network.down, elementwise(PLAIN[name], affine(network.up, x)))
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FeedForward.registry)
def test_gradients_are_those_of_finite_differences(name: str, shake: Any) -> None:
    network, x = shake(FeedForward.choose(name).make(3, 5)).double(), torch.randn(1, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(network, (x,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GATED)
def test_gated_multiplies_act_of_the_gate_with_a_linear_map(name: str, bias: bool, shake: Any) -> None:
    network, x = shake(FeedForward.choose(name).make(6, 10, bias=bias)).double(), 2 * torch.randn(2, 3, 6).double()
    hidden = elementwise(GATED[name], affine(network.gate, x)) * affine(network.up, x)
    torch.testing.assert_close(network(x), affine(network.down, hidden), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FeedForward.registry)
def test_every_token_goes_through_alone(name: str) -> None:
    network, x = FeedForward.choose(name).make(6), torch.randn(2, 5, 6)
    torch.testing.assert_close(network(x)[:, 3:4], network(x[:, 3:4]))


@pytest.mark.parametrize("name", FeedForward.registry)
def test_hidden_features_are_those_asked_for(name: str) -> None:
    network = FeedForward.choose(name).make(6, 10, bias=False)
    assert network.up.weight.shape == (10, 6)
    assert network.down.weight.shape == (6, 10)
    assert isinstance(network.down, OutputProjection)
    assert all(parameter.dim() == 2 for parameter in network.parameters())


def test_plain_has_four_times_d_model_hidden_features_by_default() -> None:
    assert ReLU.choose().make(6).up.out_features == 24


@pytest.mark.parametrize("d_model", [16, 64, 100, 384, 768, 4096])
def test_gated_has_about_as_many_weights_as_plain_by_default_in_eights(d_model: int) -> None:
    with torch.device("meta"):
        gated = ReGLU.choose().make(d_model, bias=False)
    assert gated.up.out_features == gated.gate.out_features
    assert gated.up.out_features % 8 == 0
    assert abs(gated.up.out_features - 8 * d_model / 3) <= 4
