"""The learning rate: what every schedule keeps to, and each one's own shape."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.training.schedules import Schedule

schedules = pytest.mark.parametrize("name", Schedule.registry)


@schedules
@given(steps=st.integers(2, 500), warmup=st.integers(0, 300), floor=st.floats(0, 1), step=st.integers(0, 600))
def test_every_rate_lies_between_zero_and_the_highest(name, steps, warmup, floor, step):
    share = Schedule.choose(name).make().with_warmup(step, steps=steps, warmup_steps=warmup, floor=floor)
    assert 0 <= share <= 1 + 1e-12
    if step >= warmup:
        assert share >= floor - 1e-12


@schedules
@given(warmup=st.integers(1, 100))
def test_warm_up_is_linear_and_reaches_the_highest_rate(name, warmup):
    shares = [
        Schedule.choose(name).make().with_warmup(s, steps=1000, warmup_steps=warmup, floor=0.1) for s in range(warmup)
    ]
    assert shares == pytest.approx([(s + 1) / warmup for s in range(warmup)])


@schedules
def test_no_schedule_rises_after_warm_up(name):
    shares = [
        Schedule.choose(name).make().with_warmup(s, steps=200, warmup_steps=20, floor=0.05) for s in range(20, 220)
    ]
    assert all(b <= a + 1e-12 for a, b in pairwise(shares))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_decaying_schedule_ends_at_its_floor(name):
    assert Schedule.choose(name).make().with_warmup(200, steps=200, warmup_steps=20, floor=0.1) == pytest.approx(0.1)


def test_each_schedule_has_its_own_middle():
    middle = {
        name: schedule.choose().make().with_warmup(600, steps=1000, warmup_steps=200, floor=0)
        for name, schedule in Schedule.registry.items()
    }
    assert middle == pytest.approx(
        {"cosine": 0.5, "linear": 0.5, "wsd": 1.0, "inverse-sqrt": math.sqrt(200 / 600), "constant": 1.0}
    )
