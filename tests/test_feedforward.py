"""Feed-forward networks: every activation against its formula, plain and gated; mixtures against a loop over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture.feedforward import FeedForward, MixtureOfExperts, ReGLU, ReLU, load_balancing_loss
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


D = 8


def mixture(num_experts: int, experts_per_token: int, feedforward: str = "swiglu") -> MixtureOfExperts:
    return MixtureOfExperts(
        lambda: FeedForward.choose(feedforward).make(D, 12),
        D,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )


def looped(experts: Any, token: Tensor) -> Tensor:
    """What one token becomes: its best experts, weighed by a softmax of their logits alone."""
    logits = (experts.router.weight @ token).tolist()
    best = sorted(range(len(logits)), key=lambda number: -logits[number])[: experts.experts_per_token]
    weights = torch.tensor([logits[number] for number in best]).exp()
    outputs = [experts.experts[number](token[None, None])[0, 0] for number in best]
    return sum((w * output for w, output in zip(weights / weights.sum(), outputs, strict=True)), torch.zeros(D))


@pytest.mark.parametrize("feedforward", ["gelu", "swiglu"])
@given(num_experts=st.integers(1, 5), data=st.data())
def test_a_mixture_is_that_of_a_loop_over_tokens(
    feedforward: str, num_experts: int, data: st.DataObject, shake: Any
) -> None:
    experts = shake(mixture(num_experts, data.draw(st.integers(1, num_experts)), feedforward))
    x = torch.randn(2, 3, D)
    expected = torch.stack([torch.stack([looped(experts, token) for token in text]) for text in x])
    torch.testing.assert_close(experts(x), expected, rtol=1e-4, atol=1e-4)


def test_an_expert_that_is_not_chosen_counts_for_nothing(shake: Any) -> None:
    experts, x = shake(mixture(3, 2)), torch.randn(1, 1, D)
    unused = int(experts.router(x).argmin())
    before = experts(x)
    before.sum().backward()
    assert not any(parameter.grad.any() for parameter in experts.experts[unused].parameters())
    shake(experts.experts[unused])
    assert torch.equal(experts(x), before)


def test_one_expert_is_a_plain_network_whatever_the_router_says(shake: Any) -> None:
    experts, x = shake(mixture(1, 1)), torch.randn(2, 3, D)
    torch.testing.assert_close(experts(x), experts.experts[0](x))


def test_the_router_learns(shake: Any) -> None:
    experts = shake(mixture(3, 2))
    experts(torch.randn(2, 3, D)).square().sum().backward()
    assert experts.router.weight.grad.any()


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("strength", [0.1, 5.0])
def test_balanced_experts_have_a_balancing_loss_of_one(experts_per_token: int, strength: float) -> None:
    # Token i likes expert i best and its neighbour second.
    logits = strength * (2 * torch.eye(4) + torch.eye(4).roll(1, 0))
    assert load_balancing_loss(logits, experts_per_token).item() == pytest.approx(1)


def test_experts_that_all_tokens_choose_have_the_largest_loss() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    probability = logits.softmax(-1)[0, 0].item()
    assert load_balancing_loss(logits, 1).item() == pytest.approx(4 * probability)
    half = torch.cat([logits[:3], logits[:3].roll(1, 1)])
    assert 1.5 < load_balancing_loss(half, 1).item() < load_balancing_loss(logits, 1).item()


def test_the_balancing_loss_pushes_the_favourite_down() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(4, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(load_balancing_loss(logits, 1), [logits])
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()
