"""Every position scheme against an independent statement of its formula."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.architecture.attention import identity
from minitransformer.architecture.positions import (
    ALiBi,
    Learned,
    NoPositions,
    PositionScheme,
    PositionSpace,
    Rotary,
    Sinusoidal,
    T5Relative,
    alibi_slopes,
    rotate_half,
    t5_bucket,
    token_positions,
)
from minitransformer.errors import UserError

every_scheme = pytest.mark.parametrize("name", PositionScheme.registry)


def space(**sizes: Any) -> PositionSpace:
    return PositionSpace(**{"d_model": 8, "num_heads": 2, "head_dim": 4, "max_length": 64, "causal": True, **sizes})


@every_scheme
def test_a_position_past_the_context_is_named_where_a_scheme_has_none_for_it(name: str) -> None:
    scheme = PositionScheme.choose(name).make(space())
    scheme.embed(torch.zeros(1, 2, 8), torch.tensor([[62, 63]]))
    if name in ("learned", "sinusoidal", "sinusoidal-halves"):
        with pytest.raises(UserError, match="no position 70, as context_length is 64"):
            scheme.embed(torch.zeros(1, 3, 8), torch.tensor([[63, 70, 64]]))
    else:
        scheme.embed(torch.zeros(1, 2, 8), torch.tensor([[63, 70]]))


# Positions of tokens


def test_positions_count_from_zero() -> None:
    assert token_positions(4).tolist() == [[0, 1, 2, 3]]


@given(rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_padding_anywhere_shifts_no_position(rows: list[list[bool]]) -> None:
    positions = token_positions(6, torch.tensor(rows))
    for row, found in zip(rows, positions.tolist(), strict=True):
        assert [p for p, real in zip(found, row, strict=True) if real] == list(range(sum(row)))
        assert all(0 <= p < 6 for p in found)


# What all schemes share


@every_scheme
def test_a_scheme_enters_in_one_place_at_most(name: str) -> None:
    scheme, x = PositionScheme.choose(name).make(space()), torch.randn(2, 5, 8)
    positions = token_positions(5)
    entries = [
        not torch.equal(scheme.embed(x, positions), x),
        scheme.rotation(positions) is not identity,
        scheme.score_bias(positions, positions) is not None,
    ]
    assert sum(entries) == (name != "none")


@every_scheme
def test_the_newest_tokens_alone_get_what_they_get_among_all(name: str) -> None:
    scheme, x, q = PositionScheme.choose(name).make(space()), torch.randn(2, 6, 8), torch.randn(2, 2, 6, 4)
    positions = token_positions(6)
    torch.testing.assert_close(scheme.embed(x, positions)[:, 4:], scheme.embed(x[:, 4:], positions[:, 4:]))
    torch.testing.assert_close(scheme.rotation(positions)(q)[:, :, 4:], scheme.rotation(positions[:, 4:])(q[:, :, 4:]))
    bias = scheme.score_bias(positions, positions)
    if bias is not None:
        torch.testing.assert_close(bias[:, :, 4:], scheme.score_bias(positions[:, 4:], positions))


@every_scheme
def test_each_sequence_of_a_batch_has_its_own_positions(name: str) -> None:
    scheme, x, q = PositionScheme.choose(name).make(space()), torch.randn(2, 4, 8), torch.randn(2, 2, 4, 4)
    both = torch.tensor([[0, 1, 2, 3], [5, 6, 9, 9]])
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(scheme.embed(x, both)[one], scheme.embed(x[one], both[one]))
        torch.testing.assert_close(scheme.rotation(both)(q)[one], scheme.rotation(both[one])(q[one]))
        bias = scheme.score_bias(both, both)
        if bias is not None:
            torch.testing.assert_close(bias[one], scheme.score_bias(both[one], both[one]))


@pytest.mark.parametrize("name", ["rotary", "alibi", "t5"])
@given(shift=st.integers(0, 40))
def test_relative_schemes_depend_on_offsets_alone(name: str, shift: int) -> None:
    scheme = PositionScheme.choose(name).make(space()).double()
    q, k = torch.randn(1, 2, 6, 4).double(), torch.randn(1, 2, 6, 4).double()
    scores = []
    for positions in (token_positions(6), token_positions(6) + shift):
        rotate, bias = scheme.rotation(positions), scheme.score_bias(positions, positions)
        scores.append(rotate(q) @ rotate(k).mT + (0 if bias is None else bias))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


# Sinusoidal and learned


@pytest.mark.parametrize("d_model", [8, 7])
def test_sinusoidal_is_its_formula(d_model: int) -> None:
    table = Sinusoidal.choose().make(space(d_model=d_model)).embed(torch.zeros(1, 64, d_model), token_positions(64))[0]
    for p in range(64):
        for feature in range(d_model):
            angle = p / 10000 ** ((feature - feature % 2) / d_model)
            expected = math.cos(angle) if feature % 2 else math.sin(angle)
            assert table[p, feature].item() == pytest.approx(expected, abs=1e-4)


@given(offset=st.integers(0, 30))
def test_a_sinusoidal_offset_is_a_linear_map_that_no_position_changes(offset: int) -> None:
    table = Sinusoidal.choose().make(space()).embed(torch.zeros(1, 64, 8), token_positions(64))[0]
    turns = []
    for i in range(4):
        angle = offset / 10000 ** (i / 4)
        turns.append(torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))
    torch.testing.assert_close(table[: 64 - offset] @ torch.block_diag(*turns), table[offset:], rtol=0, atol=1e-4)


def test_learned_positions_are_rows_of_a_table_that_learns() -> None:
    scheme, x = Learned.choose().make(space(max_length=10)), torch.randn(1, 3, 8)
    positions = torch.tensor([[0, 7, 2]])
    embedded = scheme.embed(x, positions)
    torch.testing.assert_close(embedded - x, scheme.table.weight[positions])
    embedded.sum().backward()
    assert scheme.table.weight.grad.any(-1).nonzero().flatten().tolist() == [0, 2, 7]
    assert scheme.table.weight.shape == (10, 8)


def test_no_positions_change_nothing() -> None:
    assert not list(NoPositions.choose().make(space()).parameters())


# Rotary


@given(position=st.integers(0, 1000), half=st.integers(1, 4))
def test_rotary_turns_the_pair_i_and_i_plus_half_by_its_angle(position: int, half: int) -> None:
    head_dim = 2 * half
    x = torch.randn(1, 1, 1, head_dim)
    turned = Rotary.choose().make(space(head_dim=head_dim)).rotation(torch.tensor([[position]]))(x).flatten().tolist()
    before = x.flatten().tolist()
    for i in range(half):
        z = complex(before[i], before[i + half])
        angle = position * 10000 ** (-2 * i / head_dim)
        z *= complex(math.cos(angle), math.sin(angle))
        assert complex(turned[i], turned[i + half]) == pytest.approx(z, abs=1e-3)


@given(position=st.integers(0, 1000))
def test_rotary_keeps_lengths_and_leaves_position_zero_alone(position: int) -> None:
    scheme, x = Rotary.choose().make(space()), torch.randn(1, 2, 1, 4)
    turned = scheme.rotation(torch.tensor([[position]]))(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(scheme.rotation(torch.tensor([[0]]))(x), x)


def test_rotary_turns_by_the_same_angles_in_a_bfloat16_model() -> None:
    x, positions = torch.randn(1, 2, 1, 64), torch.tensor([[1000]])
    exact = Rotary.choose().make(space(head_dim=64)).rotation(positions)(x)
    rounded = Rotary.choose().make(space(head_dim=64)).bfloat16().rotation(positions)(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.03, atol=0.03)


def test_rotary_of_an_odd_head_dim_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"head_dim 5 times rotary_fraction 1.0 is 5: make it even"):
        Rotary.choose().make(space(head_dim=5))


def test_turning_by_a_right_angle_swaps_the_halves() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 1, 4), torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 1, 1, 4)
    assert rotate_half(x, cos, sin).flatten().tolist() == [-3, -4, 1, 2]


# ALiBi


def published_slopes(n: int) -> list[float]:
    """The rule of the paper's reference code: a geometric sequence, and for other counts every second of the next."""
    if (n & (n - 1)) == 0:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    below = 2 ** math.floor(math.log2(n))
    return published_slopes(below) + published_slopes(2 * below)[0::2][: n - below]


@given(num_heads=st.integers(1, 130))
def test_alibi_slopes_follow_the_published_rule(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    torch.testing.assert_close(slopes, torch.tensor(published_slopes(num_heads)))
    assert len(set(slopes.tolist())) == num_heads


def test_alibi_slopes_of_some_head_counts() -> None:
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(1).tolist() == [1 / 256]
    assert alibi_slopes(3).tolist() == [1 / 16, 1 / 256, 1 / 4]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([0.5 ** (i / 2) for i in range(1, 17)]))
    torch.testing.assert_close(alibi_slopes(12)[8:], torch.tensor([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]))


def test_alibi_takes_slope_times_distance_off_the_score() -> None:
    bias = ALiBi.choose().make(space(num_heads=8)).score_bias(torch.tensor([[3, 4]]), torch.tensor([[0, 1, 2, 3, 4]]))
    assert bias.shape == (1, 8, 2, 5)
    assert bias[0, 0].tolist() == [[-1.5, -1, -0.5, 0, -0.5], [-2, -1.5, -1, -0.5, 0]]
    assert bias[0, 1, 1].tolist() == [-1, -0.75, -0.5, -0.25, 0]


# T5


def looped_bucket(offset: int, causal: bool, num_buckets: int, max_distance: int) -> int:
    """The bucket by exact comparison of powers: no logarithm, no rounding."""
    first = 0
    if causal:
        distance = max(-offset, 0)
    else:
        num_buckets //= 2
        first = num_buckets if offset > 0 else 0
        distance = abs(offset)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    steps = num_buckets - exact
    bucket = exact
    # distance ≥ exact · (max_distance / exact)^(j / steps), both sides to the power of `steps`
    while bucket < num_buckets - 1 and Fraction(distance, exact) ** steps >= Fraction(max_distance, exact) ** (
        bucket + 1 - exact
    ):
        bucket += 1
    return first + bucket


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20)])
def test_t5_buckets_are_those_of_a_loop(causal: bool, num_buckets: int, max_distance: int) -> None:
    offsets = torch.arange(-300, 301)
    buckets = t5_bucket(offsets, causal=causal, num_buckets=num_buckets, max_distance=max_distance)
    expected = [looped_bucket(offset, causal, num_buckets, max_distance) for offset in offsets.tolist()]
    assert buckets.tolist() == expected


def test_t5_buckets_known_properties() -> None:
    back = t5_bucket(-torch.arange(1000), causal=True, num_buckets=32, max_distance=128)
    assert back[:16].tolist() == list(range(16))  # each small distance has its own
    assert back.diff().ge(0).all()
    assert back[128:].eq(31).all()
    assert set(back.tolist()) == set(range(32))
    assert t5_bucket(torch.arange(5), causal=True, num_buckets=32, max_distance=128).eq(0).all()
    ahead = t5_bucket(torch.arange(1, 1000), causal=False, num_buckets=32, max_distance=128)
    behind = t5_bucket(-torch.arange(1, 1000), causal=False, num_buckets=32, max_distance=128)
    assert torch.equal(ahead, behind + 16)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_adds_the_bias_of_the_bucket_of_key_minus_query_for_each_head(causal: bool) -> None:
    scheme = T5Relative.choose().make(space(num_heads=3, causal=causal))
    queries, keys = torch.tensor([[0, 40]]), torch.tensor([[0, 3, 40, 90]])
    bias = scheme.score_bias(queries, keys)
    assert bias.shape == (1, 3, 2, 4)
    for i, p in enumerate(queries[0].tolist()):
        for j, q in enumerate(keys[0].tolist()):
            assert torch.equal(bias[0, :, i, j], scheme.table.weight[looped_bucket(q - p, causal, 32, 128)])


def test_falcons_alibi_is_alibi_of_the_keys_in_bfloat16() -> None:
    scheme = PositionScheme.choose("alibi-falcon").make(space(num_heads=2, head_dim=4))
    queries, keys = torch.tensor([[3, 300]]), torch.tensor([[0, 3, 299, 300]])
    slopes = [torch.tensor(2.0**-4).bfloat16(), torch.tensor(2.0**-8).bfloat16()]
    for head, slope in enumerate(slopes):
        of_keys = (slope * keys[0]).float() / 2  # √4
        expected = of_keys - of_keys[[1, 3]][:, None]
        torch.testing.assert_close(scheme.score_bias(queries, keys)[0, head], expected)
    assert scheme.score_bias(queries, keys)[0, 0, 1, 2] == 0  # 299 and 300 are one number in bfloat16
