"""What the seeds of an experiment decide: known results by their interval, claims corrected for their number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minitransformer.lab.experiment import Claim, ExperimentSettings, Findings, between, expected
from minitransformer.lab.experiments.gradients import GradientAgainstDepth
from minitransformer.reporting.statistics import FEWEST_SEEDS, Interval, holm
from minitransformer.tasks.task import Result

SPREAD = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
gains = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=8)


def gains_like(mean: float, half: float) -> list[float]:
    """Five gains with this mean, and this half of their 95 % interval."""
    error = half / stats.t.ppf(0.975, 4)
    return (mean + SPREAD * error * math.sqrt(5) / SPREAD.std(ddof=1)).tolist()


E9 = {"HybridNorm": (0.063, 0.0185), "ResiDual": (-0.019, 0.014), "LNS": (-0.002, 0.009), "Mix": (0.002, 0.0035)}
"""mean gains over five seeds beside Pre-LN, and half of their intervals; Peri-LN's is below"""


def verdicts(claims: list[Claim]) -> dict[str, bool | None]:
    return {criterion.claim: criterion.holds for criterion in Findings([], claims=claims).criteria}


def test_a_claim_that_five_claims_leave_uncertain_is_open_though_its_own_interval_excludes_no_gain():
    figures = {**E9, "Peri-LN": (-0.006, 0.013)}
    claims = [Claim(name, gains_like(*figure), " nats") for name, figure in figures.items()]
    assert verdicts(claims[1:2]) == {"ResiDual": False}
    assert verdicts(claims) == {"HybridNorm": True, "ResiDual": None, "LNS": None, "Mix": None, "Peri-LN": None}
    measured = {criterion.claim: criterion.measured for criterion in Findings([], claims=claims).criteria}
    assert measured["ResiDual"] == "gain -0.019 [-0.033, -0.005] nats, 5 seeds, p = 0.079 (Holm, 5 claims)"


@given(st.lists(gains, min_size=1, max_size=5))
def test_claims_are_decided_by_holm_s_p_values_of_paired_t_tests_and_never_below_five_seeds(rows):
    claims = [Claim(str(i), row) for i, row in enumerate(rows)]
    plain = []
    for row in rows:
        with np.errstate(all="ignore"):
            p = float(stats.ttest_1samp(row, 0).pvalue) if len(row) >= FEWEST_SEEDS and np.ptp(row) > 0 else 1.0
        plain.append(0.0 if len(row) >= FEWEST_SEEDS and np.ptp(row) == 0 and row[0] else p)
    for row, p, holds in zip(rows, holm(plain), verdicts(claims).values(), strict=True):
        if abs(p - 0.05) > 1e-9:
            assert holds == (None if p >= 0.05 else np.mean(row) > 0)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_fewer_than_five_paired_seeds_leave_a_claim_open(seeds):
    claim = Claim("it helps", [1.0, 1.01, 0.99, 1.02][:seeds])
    (criterion,) = Findings([], claims=[claim]).criteria
    assert criterion.holds is None
    assert "fewer than 5 decide nothing" in criterion.measured


def test_claims_without_values_are_open_and_count_among_the_claims():
    claims = [Claim("never measured", []), Claim("it helps", gains_like(0.063, 0.0185))]
    lost, helps = Findings([], claims=claims).criteria
    assert (lost.measured, lost.holds, helps.holds) == ("not measured", None, True)
    assert "(Holm, 2 claims)" in helps.measured


def test_gains_of_runs_that_diverged_are_open():
    (criterion,) = Findings([], claims=[Claim("it helps", [math.inf, 1.0, 1.0, 1.0, 1.0])]).criteria
    assert criterion.holds is None


@pytest.mark.parametrize(
    ("interval", "holds"),
    [
        ((0.1, 0.05, 0.15), True),
        ((0.1, -0.05, 0.25), None),  # its mean lies within, its interval does not
        ((0.25, 0.15, 0.35), None),
        ((0.3, 0.21, 0.39), False),
        ((-0.3, -0.39, -0.21), False),
        ((0.1, -math.inf, math.inf), None),
        ((math.nan, math.nan, math.nan), False),
    ],
)
def test_a_known_result_is_decided_by_its_interval_and_not_by_the_mean_alone(interval, holds):
    assert between("a slope of about 0", Interval(*interval, n=10), -0.2, 0.2).holds is holds


def test_a_known_result_over_seeds_has_one_range_and_may_be_left_open():
    values = [0.30, 0.31, 0.32]
    assert expected("small", values, at_most=0.4).holds is True
    assert expected("small", values, at_most=0.2).holds is False
    assert expected("small", values, at_most=0.315).holds is None
    assert expected("small", values, at_most=0.4, is_open=True).holds is None
    assert expected("small", []).measured == "not measured"


def test_the_slopes_of_the_gradient_are_stated_with_those_of_one_token():
    experiment = GradientAgainstDepth(ExperimentSettings())
    depths = [2, 4, 8]
    measured = {"norms": [1.0, 1.0, 1.0], "of_a_token": [1.0, 0.9, 0.81]}
    task = {"mode": "real", "placement": "residual", "depths": depths}
    results = [Result({**task, "seed": seed}, measured) for seed in range(2)]
    (criterion,) = experiment.conclude(results).criteria
    assert criterion.holds is True
    assert "of one token -0.152" in criterion.measured
