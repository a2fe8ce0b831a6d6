"""Mixtures of experts against a loop over tokens, and the loss that balances them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture.feedforward import FeedForward, MixtureOfExperts, load_balancing_loss

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
