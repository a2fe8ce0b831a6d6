"""What interleaved rounds allow one to say: quartiles, paired ratios, intervals, winners."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.benchmark.rounds import CaseResult
from minitransformer.benchmark.statistics import (
    Exponent,
    Spread,
    compare_rounds,
    least_rounds,
    median_interval,
)
from tests.bench_for_tests import case_of


def test_quartiles_stand_around_the_median():
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(3, 2, 4)


def result_of(values, base, lower_is_better=False):
    """Of two contestants, b and the base a."""
    case = case_of(lower_is_better=lower_is_better, a=[1.0], b=[1.0])
    return CaseResult(case, "a", {"a": list(base), "b": list(values)}, {"b": list(base)})


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_exactly_twice_as_good_is_a_ratio_of_two_whatever_the_unit(lower_is_better):
    base = np.array([3.0, 1.0, 7.0, 2.0, 5.0, 4.0])
    values = base / 2 if lower_is_better else base * 2
    ratio = result_of(values, base, lower_is_better).ratio("b")
    assert (ratio.median, ratio.low, ratio.high) == (2, 2, 2)


def test_what_slows_a_whole_round_leaves_no_trace_in_paired_ratios():
    draws = np.random.default_rng(0)
    load = draws.uniform(1, 10, 15)
    ratio = result_of(1.5 / load, 1 / load).ratio("b")
    assert ratio.low == pytest.approx(1.5)
    assert ratio.high == pytest.approx(1.5)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        interval = median_interval(draws.lognormal(0.0, 0.5, 11))
        covered += interval.low <= 1.0 <= interval.high
    assert covered >= 950


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_a_median_lies_in_its_interval(values):
    interval = median_interval(values)
    assert interval.low <= interval.median <= interval.high


def test_too_few_rounds_have_no_interval():
    assert least_rounds(0.95) == 6
    assert median_interval([2.0] * 5).high == math.inf
    assert median_interval([2.0] * 6).high == 2.0


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99, 0.999])
def test_the_least_rounds_are_the_first_with_an_interval(level):
    least = least_rounds(level)
    assert median_interval([1.0] * least, level).high == 1.0
    assert median_interval([1.0] * (least - 1), level).high == math.inf


def test_two_equal_contestants_are_never_told_apart():
    same = [3.0, 1.0, 2.0] * 5
    assert not compare_rounds({"a": same, "b": same}).winner


def test_the_best_of_many_alike_is_called_in_no_more_than_one_of_twenty():
    draws = np.random.default_rng(2)
    called = sum(compare_rounds({name: draws.lognormal(0, 0.2, 13) for name in "abcd"}).winner for _ in range(500))
    assert called <= 25


def test_a_contestant_twice_as_good_in_noise_is_called():
    draws = np.random.default_rng(3)
    samples = {"slow": draws.lognormal(0, 0.1, 11), "fast": 2 * draws.lognormal(0, 0.1, 11)}
    found = compare_rounds(samples)
    assert found.winner
    assert str(found).startswith("fast wins: ")


def test_a_lead_within_what_the_same_differs_by_from_itself_is_noise():
    samples = {"a": [1.0] * 11, "b": [1.1] * 11}
    assert compare_rounds(samples, floor=1.05).winner
    found = compare_rounds(samples, floor=1.2)
    assert not found.winner
    assert str(found) == "no winner: b and a differ by less than the noise"


def test_three_rounds_say_too_little():
    found = compare_rounds({"a": [1.0] * 3, "b": [2.0] * 3})
    assert str(found) == "no winner: 3 rounds are too few, at least 6 are needed"


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_a_power_law_is_found(p, factor):
    sizes = [1, 2, 4, 8]
    found = Exponent.of(sizes, [factor * size**p for size in sizes])
    assert found.value == pytest.approx(p, abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-5)


def test_one_size_has_no_exponent():
    assert Exponent.of([2.0], [3.0]) is None
