"""What seeds allow one to say, against scipy and against laws."""

import math
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from minitransformer.errors import UserError
from minitransformer.reporting.statistics import (
    FEWEST_SEEDS,
    Interval,
    holm,
    loglog_slope,
    mean_interval,
    paired_difference,
    ranking,
)

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
samples = st.integers(2, 12).flatmap(lambda n: arrays(float, n, elements=numbers))
levels = st.sampled_from([0.5, 0.9, 0.95, 0.99])


@st.composite
def tables(draw, names=3):
    seeds = draw(st.integers(2, 8))
    return {f"name {i}": draw(arrays(float, seeds, elements=numbers)) for i in range(draw(st.integers(2, names)))}


@given(samples, levels)
def test_the_mean_s_interval_is_scipy_s_t_interval(values, level):
    assume(np.ptp(values) > 0)
    low, high = stats.t.interval(level, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    interval = mean_interval(values, level)
    np.testing.assert_allclose([interval.low, interval.high], [low, high], rtol=1e-9, atol=1e-9)
    assert interval.n == len(values)


@given(samples, st.floats(-10, 10), st.floats(0.1, 10))
def test_intervals_move_and_stretch_with_the_values(values, shift, scale):
    plain, moved = mean_interval(values), mean_interval(scale * values + shift)
    for end in ("mean", "low", "high"):
        assert getattr(moved, end) == pytest.approx(scale * getattr(plain, end) + shift, abs=1e-6)


@given(samples)
def test_a_higher_level_never_makes_an_interval_narrower(values):
    narrow, wide = mean_interval(values, 0.8), mean_interval(values, 0.99)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high


def test_one_value_says_nothing_of_the_spread():
    interval = mean_interval([3.0])
    assert interval == Interval(3.0, -math.inf, math.inf, 1)
    assert not interval.excludes(1e9)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_a_mean_needs_a_row_of_values(values):
    with pytest.raises(ValueError, match="shape"):
        mean_interval(values)


def test_a_level_is_a_probability():
    with pytest.raises(ValueError, match=r"level is 95.*between 0 and 1"):
        mean_interval([1.0, 2.0], 95)


@given(arrays(float, (2, 6), elements=numbers), levels)
def test_the_paired_difference_is_scipy_s_paired_t_test(pair, level):
    a, b = pair
    assume(np.ptp(a - b) > 0)
    low, high = stats.ttest_rel(a, b).confidence_interval(level)
    difference = paired_difference(a, b, level)
    np.testing.assert_allclose([difference.low, difference.high], [low, high], rtol=1e-9, atol=1e-9)


@given(arrays(float, (2, 5), elements=numbers))
def test_the_paired_difference_changes_its_sign_with_the_order(pair):
    a, b = pair
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-9)


@given(arrays(float, (2, 5), elements=numbers), arrays(float, 5, elements=numbers))
def test_what_seeds_share_cancels_in_a_paired_difference(pair, shared):
    a, b = pair
    plain, shifted = paired_difference(a, b), paired_difference(a + shared, b + shared)
    assert (shifted.low, shifted.high) == pytest.approx((plain.low, plain.high), abs=1e-6)


def test_one_pair_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="two or more seeds"):
        paired_difference([1.0], [2.0])


def test_unequal_numbers_of_seeds_cannot_be_paired():
    with pytest.raises(ValueError, match="one value per seed"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


@given(st.floats(-3, 3), arrays(float, 4, elements=st.floats(0.1, 10)))
def test_the_slope_of_exact_power_laws_is_their_exponent(exponent, factors):
    x = np.array([1.0, 2.0, 5.0, 16.0])
    slope = loglog_slope(x, factors[:, None] * x**exponent)
    assert slope.mean == pytest.approx(exponent, abs=1e-9)
    assert slope.low == pytest.approx(slope.high, abs=1e-9)


@given(arrays(float, (3, 5), elements=st.floats(0.1, 10)))
def test_each_seed_s_slope_is_scipy_s_regression_of_the_logarithms(ys):
    x = np.array([1.0, 2.0, 4.0, 8.0, 32.0])
    slopes = [stats.linregress(np.log(x), np.log(y)).slope for y in ys]
    expected, slope = mean_interval(slopes), loglog_slope(x, ys)
    assert (slope.mean, slope.low, slope.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(
    ("x", "ys", "message"),
    [
        ([1.0, 2.0], [[1.0, 0.0]], "positive"),
        ([0.0, 2.0], [[1.0, 1.0]], "positive"),
        ([2.0, 2.0], [[1.0, 3.0]], "two different x"),
        ([1.0, 2.0, 3.0], [[1.0, 3.0]], "one column for each x"),
    ],
)
def test_what_has_no_slope_is_refused(x, ys, message):
    with pytest.raises(ValueError, match=message):
        loglog_slope(x, ys)


def test_holm_s_correction_is_the_published_procedure():
    # Sorted: 0.005 · 4, 0.01 · 3, 0.03 · 2, 0.04 · 1, each at least as large as the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_a_corrected_p_value_lies_between_the_plain_one_and_bonferroni_s(p_values):
    for plain, corrected in zip(p_values, holm(p_values), strict=True):
        assert plain <= corrected <= min(1.0, len(p_values) * plain) + 1e-12


@given(tables(4), st.booleans())
def test_a_winner_s_interval_against_every_other_excludes_zero(values, lower_is_better):
    result = ranking(values, lower_is_better=lower_is_better)
    if result.winner is None:
        return
    for name in values.keys() - {result.winner}:
        difference = paired_difference(values[result.winner], values[name])
        assert difference.high < 0 if lower_is_better else difference.low > 0


@given(tables(4))
def test_every_pair_of_a_ranking_is_the_paired_difference_and_scipy_s_paired_t_test(values):
    result = ranking(values)
    pairs = [(values[pair.first], values[pair.second]) for pair in result.comparisons]
    assert [pair.difference for pair in result.comparisons] == [paired_difference(a, b) for a, b in pairs]
    same = [np.ptp(a - b) == 0 for a, b in pairs]
    with np.errstate(all="ignore"):
        p_values = [
            float((a == b).all()) if still else stats.ttest_rel(a, b).pvalue
            for (a, b), still in zip(pairs, same, strict=True)
        ]
    assert [pair.p for pair in result.comparisons] == pytest.approx(holm(p_values), rel=1e-6)


def test_hundreds_of_names_are_ranked_at_once(monkeypatch):
    """scipy takes as long for one p-value as for all of them."""
    asked = []
    sf = stats.t.sf
    monkeypatch.setattr(stats.t, "sf", lambda *arguments: asked.append(1) or sf(*arguments))
    draws = np.random.default_rng(0)
    assert len(ranking({str(i): draws.normal(size=5) for i in range(100)}).comparisons) == 4950
    assert len(asked) == 1


@given(tables())
def test_no_winner_is_named_where_an_interval_of_the_best_covers_zero(values):
    best, *others = sorted(values, key=lambda name: values[name].mean())
    covered = any(not paired_difference(values[best], values[other]).excludes(0) for other in others)
    assert not (covered and ranking(values).winner)


def test_a_clear_winner_is_named():
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=8)
    values = {"worse": seeds + 1 + 0.01 * rng.normal(size=8), "better": seeds, "worst": seeds + 2}
    result = ranking(values)
    assert (result.winner, result.order) == ("better", ("better", "worse", "worst"))
    assert str(result).startswith("better is best")
    assert ranking(values, lower_is_better=False).winner == "worst"


def test_the_correction_for_many_pairs_can_take_a_winner_away():
    a, b = np.array([0.0, 0.1, -0.1, 0.05, 0.0]), np.array([0.2, 0.4, 0.05, 0.2, 0.1])
    alone = {"a": a, "b": b}
    crowd = {f"other {i}": 9 + np.arange(5) * (-1.0) ** i * (i + 1) for i in range(5)}
    assert ranking(alone).winner == "a"
    assert ranking(alone | crowd).winner is None


def test_chance_alone_rarely_makes_a_winner():
    rng = np.random.default_rng(1)
    winners = sum(ranking({str(i): rng.normal(size=5) for i in range(4)}).winner is not None for _ in range(120))
    assert winners <= 6 + 3 * math.sqrt(6)


@given(tables(4), st.floats(0, 20))
def test_a_winner_has_five_seeds_and_differs_from_every_other_by_what_is_worth_naming(values, smallest):
    result = ranking(values, smallest=smallest)
    if result.winner is None:
        return
    assert result.seeds >= FEWEST_SEEDS
    assert all(abs(pair.difference.mean) >= smallest for pair in result.comparisons if pair.first == result.winner)


@pytest.mark.parametrize("seeds", range(1, 5))
def test_fewer_than_five_seeds_name_no_winner(seeds):
    result = ranking({"a": [1.0, 1.1, 1.2, 1.3][:seeds], "b": [99.0, 99.2, 99.1, 99.1][:seeds]})
    assert result.winner is None
    assert "fewer than the 5" in str(result)


def test_a_difference_that_is_sure_and_not_worth_naming_makes_no_winner():
    seeds = np.array([1.0, 1.2, 1.1, 1.3, 0.9])
    values = {"0.1": seeds, "0.1001": seeds + 1.3e-6 + 1e-9 * np.arange(5)}
    result = ranking(values, smallest=0.002)
    assert result.winner is None
    assert str(result) == "No winner: 0.1 differs from 0.1001 by less than 0.002."
    assert ranking(values).winner == "0.1"


def test_of_many_rivals_their_number_is_named():
    draws = np.random.default_rng(0)
    assert "5 of the 5 others" in str(ranking({str(i): draws.normal(size=5) for i in range(6)}))


def test_names_that_diverged_come_last_and_nothing_wins_against_them():
    result = ranking({"diverged": [1.0, math.nan], "fine": [2.0, 2.1], "infinite": [math.inf, math.inf]})
    assert result.order[0] == "fine"
    assert result.winner is None


def test_a_ranking_needs_the_same_seeds():
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        ranking({"a": [1.0], "b": [1.0, 2.0]})


def test_an_interval_reads_to_two_digits_of_its_half():
    assert str(Interval(1.23456, 1.2222, 1.24692, 3)) == "1.235 [1.222, 1.247]"
    assert str(mean_interval([1.23456])) == "1.235"
    assert str(mean_interval([0.3, 0.1 + 0.2, 0.3])) == "0.3"  # all of its spread is rounding


def test_without_scipy_the_remedy_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[lab\]"'):
        mean_interval([1.0, 2.0])
