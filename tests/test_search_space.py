"""What a search tries: grids, draws, and the rungs of successive halving."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.analysis.search_space import Range, draws, grid, rungs
from minitransformer.errors import UserError
from tests.sweeping_for_tests import LR, RESIDUAL

pytestmark = pytest.mark.unchecked_shapes


def test_a_grid_is_every_combination_once_the_last_setting_fastest():
    assert grid([LR, RESIDUAL]) == [
        {"lr": 1e-3, "residual": "pre"},
        {"lr": 1e-3, "residual": "post"},
        {"lr": 3e-3, "residual": "pre"},
        {"lr": 3e-3, "residual": "post"},
    ]


SPACE = [Range("lr", 1e-4, 1e-1), Range("num_layers", 2, 8), Range("dropout", 0.0, 0.3), RESIDUAL]


@given(count=st.integers(1, 30), seed=st.integers(0, 999))
def test_random_draws_are_different_within_their_ranges_and_repeat_with_their_seed(count, seed):
    drawn = draws(SPACE, count, seed)
    assert drawn == draws(SPACE, count + 5, seed)[:count]
    assert len({tuple(one.values()) for one in drawn}) == count
    for one in drawn:
        assert 1e-4 <= one["lr"] <= 1e-1
        assert type(one["num_layers"]) is int
        assert 2 <= one["num_layers"] <= 8
        assert 0 <= one["dropout"] <= 0.3
        assert one["residual"] in ("pre", "post")


def test_draws_are_even_in_the_logarithm_over_wide_ranges_only():
    wide = [one["lr"] for one in draws([Range("lr", 1e-4, 1e-2)], 400, 0)]
    assert sum(lr < 1e-3 for lr in wide) == pytest.approx(200, abs=40)
    narrow = [one["lr"] for one in draws([Range("lr", 1e-3, 5e-3)], 200, 0)]
    assert sum(lr < 3e-3 for lr in narrow) == pytest.approx(100, abs=30)
    assert draws([Range("lr", 1e-4, 1e-2)], 5, 0) != draws([Range("lr", 1e-4, 1e-2)], 5, 1)


@given(steps=st.integers(1, 5000), count=st.integers(1, 100), factor=st.integers(2, 5), every=st.integers(1, 500))
def test_rungs_grow_by_the_factor_to_all_steps_and_fall_on_validations(steps, count, factor, every):
    try:
        found = rungs(steps, count, factor, every)
    except UserError:
        assert count < factor or steps < count
        return
    assert found[-1] == steps
    assert found == sorted(set(found))
    assert all(later == factor * earlier for earlier, later in pairwise(found[:-1]))
    assert all(rung % min(found[0], every) == 0 for rung in found[:-1])
    assert factor ** (len(found) - 1) <= count < factor ** len(found)
