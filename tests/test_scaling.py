"""What bounds scores and what slows turns: soft caps, rotary fractions and the scalings of rotary frequencies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitransformer.architecture.kernels import KERNELS
from minitransformer.architecture.positions import PositionSpace, Rotary, token_positions
from minitransformer.architecture.rotary_scaling import Llama3Scaling, PositionInterpolation, RotaryScaling
from minitransformer.errors import UserError

every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def space(**sizes: Any) -> PositionSpace:
    return PositionSpace(**{"d_model": 16, "num_heads": 2, "head_dim": 8, "max_length": 64, "causal": True, **sizes})


def looped(q: Tensor, k: Tensor, v: Tensor, *, softcap: float, causal: bool) -> Tensor:
    """The equation for one text and one head, score by score."""
    out = torch.zeros(len(q), v.size(1), dtype=q.dtype)
    for i in range(len(q)):
        seen = range(i + 1) if causal else range(len(k))
        scores = [float(q[i] @ k[j]) / math.sqrt(q.size(1)) for j in seen]
        weights = [math.exp(softcap * math.tanh(score / softcap)) for score in scores]
        out[i] = sum(weight / sum(weights) * v[j] for weight, j in zip(weights, seen, strict=True))
    return out


@every_kernel
@given(softcap=st.floats(0.1, 30), causal=st.booleans(), size=st.floats(0.1, 10))
def test_a_softcap_is_that_of_a_loop_in_float64(kernel: Any, softcap: float, causal: bool, size: float) -> None:
    q, k, v = size * torch.randn(3, 2, 3, 5, 4).double()
    actual = kernel(q, k, v, softcap=softcap, causal=causal)
    for b in range(2):
        for h in range(3):
            expected = looped(q[b, h], k[b, h], v[b, h], softcap=softcap, causal=causal)
            torch.testing.assert_close(actual[b, h], expected, rtol=1e-10, atol=1e-10)


@every_kernel
def test_a_wide_softcap_changes_nothing(kernel: Any) -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4).double()
    torch.testing.assert_close(kernel(q, k, v, softcap=1e6), kernel(q, k, v), rtol=1e-9, atol=1e-9)


@given(turned=st.sampled_from([2, 4, 6]))
def test_a_rotary_fraction_turns_a_smaller_head_and_leaves_the_rest_alone(turned: int) -> None:
    x, positions = torch.randn(2, 3, 5, 8), token_positions(5)
    out = Rotary.choose(fraction=turned / 8).make(space()).rotation(positions)(x)
    assert torch.equal(out[..., turned:], x[..., turned:])
    small = Rotary.choose().make(space(head_dim=turned)).rotation(positions)(x[..., :turned])
    torch.testing.assert_close(out[..., :turned], small)
    assert (out[:, :, 1:, :turned] != x[:, :, 1:, :turned]).all()


def rescaled(name: str, turns: list[float], **settings: Any) -> list[float]:
    """What becomes of frequencies that turn so often in the original length, as multiples of what they were."""
    frequencies = 2 * math.pi * torch.tensor(turns) / 100
    return (RotaryScaling.choose(name, **settings).make().rescale(frequencies) / frequencies).tolist()


def test_linear_scaling_divides_every_frequency() -> None:
    assert rescaled("linear", [0.1, 1.0, 50.0], factor=8.0) == pytest.approx([1 / 8] * 3)
    assert rescaled("none", [0.1, 1.0, 50.0]) == [1.0] * 3


def test_llama3_scaling_slows_slow_turns_leaves_fast_ones_and_goes_over_between() -> None:
    found = rescaled("llama3", [0.2, 1.0, 2.5, 4.0, 30.0], factor=8.0, original_length=100)
    assert found == pytest.approx([1 / 8, 1 / 8, (1 / 8 + 1) / 2, 1, 1])
    wider = {"low_freq_factor": 2.0, "high_freq_factor": 10.0, "original_length": 100}
    assert rescaled("llama3", [1.9, 4.0, 11.0], factor=4.0, **wider) == pytest.approx([1 / 4, 7 / 16, 1])


def test_a_linear_factor_puts_every_position_at_its_share() -> None:
    x = torch.randn(1, 2, 4, 8)
    scaled = (
        Rotary.choose(scaling=PositionInterpolation.choose(factor=4.0))
        .make(space())
        .rotation(torch.tensor([[0, 4, 8, 40]]))(x)
    )
    torch.testing.assert_close(scaled, Rotary.choose().make(space()).rotation(torch.tensor([[0, 1, 2, 10]]))(x))


def test_llama_3_1_has_the_frequencies_of_its_public_code() -> None:
    # Its base, length and factors; the first pair, one between and the last, reckoned apart from our code.
    scaling = Llama3Scaling.choose(factor=8.0, original_length=8192).make()
    pairs = torch.arange(64, dtype=torch.float64)
    frequencies = 500000.0 ** (-pairs / 64)
    expected = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency if wavelength < 8192 / 4 else frequency / 8 if wavelength > 8192 / 1 else between)
    torch.testing.assert_close(scaling.rescale(frequencies), torch.tensor(expected, dtype=torch.float64))


def test_yarn_leaves_fast_turns_slows_slow_ones_and_ramps_between_by_pair() -> None:
    scaling = RotaryScaling.choose("yarn", factor=4.0, beta_fast=8.0, beta_slow=0.5, original_length=100)
    found, expected = scaling.make(base=50.0).rescale(50.0 ** (-torch.arange(16) / 16)), []
    edges = [16 * math.log(100 / (2 * math.pi * beta)) / math.log(50.0) for beta in (8.0, 0.5)]
    for pair in range(16):  # the limits of the ramp lie between pairs, and are rounded outwards
        ramp = (pair - math.floor(edges[0])) / (math.ceil(edges[1]) - math.floor(edges[0]))
        slowed = min(max(ramp, 0.0), 1.0)
        expected.append(50.0 ** (-pair / 16) * (slowed / 4 + 1 - slowed))
    torch.testing.assert_close(found, torch.tensor(expected))
    assert scaling.make().magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_the_magnitude_multiplies_queries_and_keys() -> None:
    x, positions = torch.randn(1, 2, 4, 8), token_positions(4)
    larger = RotaryScaling.choose("yarn", factor=4.0, original_length=100, magnitude=1.5)
    plain = RotaryScaling.choose("yarn", factor=4.0, original_length=100, magnitude=1.0)
    found, expected = (
        Rotary.choose(scaling=s, base=50.0).make(space()).rotation(positions)(x) for s in (larger, plain)
    )
    torch.testing.assert_close(found, 1.5 * expected)


@given(context=st.integers(1, 400))
def test_dynamic_frequencies_are_those_of_a_greater_base_once_the_context_is_longer(context: int) -> None:
    scaling = RotaryScaling.choose("dynamic", factor=4.0, original_length=100).make(50.0, context)
    base = 50.0 * max(4 * context / 100 - 3, 1) ** (8 / 6)  # of 8 features
    pairs = torch.arange(4, dtype=torch.float64) / 4
    torch.testing.assert_close(scaling.rescale(50.0**-pairs), base**-pairs, rtol=1e-6, atol=0)


def test_longrope_has_one_divisor_for_each_pair_by_the_length_of_the_context() -> None:
    settings = {"short_factors": (1.0, 2.0), "long_factors": (4.0, 8.0), "original_length": 16}
    short, long = (RotaryScaling.choose("longrope", **settings).make(50.0, context) for context in (16, 17))
    assert short.rescale(torch.ones(2)).tolist() == [1, 1 / 2]
    assert long.rescale(torch.ones(2)).tolist() == [1 / 4, 1 / 8]
    assert (short.magnitude, long.magnitude) == (1.0, pytest.approx(math.sqrt(1 + math.log(17 / 16) / math.log(16))))
    with pytest.raises(UserError, match="rotary_short_factors has 2 numbers: give one for each of 4 pairs, or none"):
        Rotary.choose(scaling=RotaryScaling.choose("longrope", **settings)).make(space(max_length=16))


def test_layers_may_turn_by_another_base_or_not_at_all() -> None:
    x, positions = torch.randn(1, 2, 4, 8), token_positions(4)
    halved = PositionInterpolation.choose(factor=2.0)
    scheme = Rotary.choose(base=50.0, scaling=halved, window_base=5.0, layers=(True, True, False)).make(space())
    rotations, places = scheme.rotations(positions, [3, None, None, 3])
    found = [rotations[place](x) for place in places]
    in_windows = Rotary.choose(base=5.0).make(space()).rotation(positions)(x)
    everywhere = Rotary.choose(base=50.0, scaling=halved).make(space()).rotation(positions)(x)
    for actual, expected in zip(found, [in_windows, everywhere, x, in_windows], strict=True):
        assert torch.equal(actual, expected)
