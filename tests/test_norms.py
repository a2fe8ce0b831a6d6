"""Norms: by hand, torch's fused kernels and the modules are one function."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture.norms import DyT, LayerNorm, Norm, RMSNorm, layer_norm, rms_norm

STARTS = {"layer": 1.0, "rms": 1.0, "dyt": 1.0, "rms-zero-centred": 0.0}
"""gains of the norms of the package"""
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**16)


def looped(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centre: bool) -> Tensor:
    """The norm of one token after another, in Python's floats."""
    rows = []
    for row in x.reshape(-1, x.size(-1)).tolist():
        mean = math.fsum(row) / len(row) if centre else 0.0
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / len(row) + eps)
        shift = [0.0] * len(row) if bias is None else bias.tolist()
        gains = weight.tolist()
        rows.append([(value - mean) / spread * g + b for value, g, b in zip(row, gains, shift, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view_as(x)


@given(shape=shapes, seed=seeds, biased=st.booleans(), eps=st.sampled_from([1e-5, 1e-2]))
def test_layer_norm_by_hand_is_the_equation_and_torch_and_the_module(
    shape: tuple[int, ...], seed: int, biased: bool, eps: float
) -> None:
    torch.manual_seed(seed)
    x = (3 * torch.randn(shape) + 1).double()
    module = LayerNorm.choose(eps=eps).make(shape[-1], bias=biased).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    by_hand = layer_norm(x, module.weight, module.bias, eps)
    expected = looped(x, module.weight, module.bias, eps, centre=True)
    torch.testing.assert_close(by_hand, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(module(x), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(F.layer_norm(x, shape[-1:], module.weight, module.bias, eps), by_hand)


@given(shape=shapes, seed=seeds, eps=st.sampled_from([1e-5, 1e-2]))
def test_rms_norm_by_hand_is_the_equation_and_torch_and_the_module(
    shape: tuple[int, ...], seed: int, eps: float
) -> None:
    torch.manual_seed(seed)
    x = (3 * torch.randn(shape) + 1).double()
    module = RMSNorm.choose(eps=eps).make(shape[-1]).double()
    torch.nn.init.normal_(module.weight)
    by_hand = rms_norm(x, module.weight, eps)
    expected = looped(x, module.weight, None, eps, centre=False)
    torch.testing.assert_close(by_hand, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F.rms_norm(x, shape[-1:], module.weight, eps), by_hand)


@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_layer_norm_by_hand_are_those_of_the_module(biased: bool) -> None:
    module = LayerNorm.choose(bias=biased).make(6).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6).double().requires_grad_()
    leaves = [x, *module.parameters()]
    by_hand = torch.autograd.grad(layer_norm(x, module.weight, module.bias, module.eps).sin().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(module(x).sin().sum(), leaves), by_hand, rtol=1e-10, atol=1e-12)


def test_gradients_of_rms_norm_by_hand_are_those_of_the_module() -> None:
    module = RMSNorm.choose().make(6).double()
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 3, 6).double().requires_grad_()
    by_hand = torch.autograd.grad(rms_norm(x, module.weight, module.eps).sin().sum(), [x, module.weight])
    fused = torch.autograd.grad(module(x).sin().sum(), [x, module.weight])
    torch.testing.assert_close(fused, by_hand, rtol=1e-10, atol=1e-12)


def test_layer_norm_gives_every_token_mean_0_and_variance_1() -> None:
    y = LayerNorm.choose().make(64)(5 * torch.randn(3, 4, 64) + 2)
    torch.testing.assert_close(y.mean(-1), torch.zeros(3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(3, 4), rtol=1e-4, atol=1e-4)


def test_rms_norm_gives_every_token_mean_square_1_and_keeps_its_direction() -> None:
    x = 5 * torch.randn(3, 4, 64) + 2
    y = RMSNorm.choose().make(64)(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F.cosine_similarity(x, y, dim=-1), torch.ones(3, 4))


@pytest.mark.parametrize("name", Norm.registry)
def test_a_norm_starts_alike_each_time_ours_with_gains_of_1_and_biases_of_0_and_takes_eps(name: str) -> None:
    has_eps = "eps" in {field.name for field in fields(Norm.named(name).Settings)}
    norm: Any = Norm.choose(name, **({"eps": 0.5} if has_eps else {})).make(5)
    again = Norm.choose(name).make(5).state_dict()
    for parameter_name, parameter in norm.named_parameters():
        assert torch.equal(parameter, again[parameter_name])
        if name not in STARTS:
            continue
        start = {"bias": 0.0, "alpha": 0.5}.get(parameter_name, STARTS[name])
        assert parameter.eq(start).all()
    assert not has_eps or norm.eps == 0.5
    assert not any(name == "bias" for name, _ in Norm.choose(name).make(5, bias=False).named_parameters())


@pytest.mark.parametrize("name", Norm.registry)
def test_a_norm_of_a_token_ignores_all_other_tokens(name: str) -> None:
    norm, x = Norm.choose(name).make(6), torch.randn(2, 5, 6)
    torch.testing.assert_close(norm(x)[:, 2], norm(x[:, 2]))


def test_dyt_squashes_each_feature_by_itself() -> None:
    norm = DyT.choose().make(3).double()
    with torch.no_grad():
        norm.alpha.fill_(0.25)
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.5, -0.5]))
    x = torch.tensor([4.0, -8.0, 2.0]).double()
    expected = [math.tanh(1.0), 2 * math.tanh(-2.0) + 0.5, 3 * math.tanh(0.5) - 0.5]
    torch.testing.assert_close(norm(x), torch.tensor(expected).double())


@pytest.mark.parametrize("name", Norm.registry)
def test_a_norm_of_bfloat16_under_autocast_warns_of_nothing_and_is_the_float32_one_rounded(name, shake):
    norm = shake(Norm.choose(name).make(16))
    x = torch.randn(3, 5, 16).bfloat16()
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        found = norm(x)
    torch.testing.assert_close(found.float(), norm(x.float()).bfloat16().float(), atol=1e-2, rtol=1e-2)
