"""Rounds of a benchmark: every contestant beside the base, within the time, whatever fails."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.benchmark import rounds
from minitransformer.benchmark.case import Absent, Case, Contestant
from minitransformer.benchmark.rounds import AGAIN, measure
from minitransformer.benchmark.workers import TimeUp
from tests.bench_for_tests import PLAN, Fake, case_of


@pytest.fixture(autouse=True)
def fakes():
    Fake.all = []
    return Fake.all


def test_every_contestant_has_a_sample_in_every_round_and_warm_up_is_dropped(fakes):
    result = measure(case_of(a=[9.0] + [1.0] * 99, b=[7.0] + [2.0] * 11), PLAN, start=Fake)
    assert result.samples["a"] == [1.0] * 22  # beside itself, and beside b
    assert result.samples["b"] == [2.0] * 11
    assert result.beside["b"] == [1.0] * 11
    assert all(fake.closed for fake in fakes)


def test_no_more_than_the_base_and_one_contestant_are_alive_at_a_time(fakes):
    alive = []

    class Counted(Fake):
        def sample(self, deadline=math.inf):
            alive.append(sum(not fake.closed for fake in fakes))
            return super().sample(deadline)

    result = measure(case_of(a=[1.0], b=[2.0], c=[3.0], d=[4.0], e=[5.0]), PLAN, start=Counted)
    assert max(alive) == 2
    assert str(result.verdict()).startswith("e wins: ")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_case_that_needs_none_has_no_warm_up(fresh, fakes):
    result = measure(case_of(a=[1.0], fresh=fresh, warmup=False), replace(PLAN, twin=False), start=Fake)
    assert sum(len(fake.asked) for fake in fakes) == len(result.samples["a"]) == 11


def test_the_order_within_rounds_is_shuffled():
    lines = []
    plan = replace(PLAN, rounds=60, twin=False)
    measure(case_of(a=[1.0], b=[1.0], c=[1.0]), plan, start=Fake, report=lines.append)
    order = "".join(line[-1] for line in lines if "round" in line)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert set(rounds[:60]) == {"ab", "ba"}
    assert set(rounds[60:]) == {"ac", "ca"}


def test_the_base_is_the_first_one_and_is_measured_twice():
    result = measure(case_of(a=[1.0], b=[2.0]), PLAN, start=Fake)
    assert result.base == "a"
    assert list(result.samples) == ["a", f"a{AGAIN}", "b"]
    assert result.ratio("b").median == 2
    assert str(result.verdict()) == "b wins: 2 [2–2] times as good as a"


def test_a_base_can_be_named():
    assert measure(case_of(a=[1.0], b=[2.0]), replace(PLAN, base="b"), start=Fake).base == "b"
    assert measure(case_of(a=[1.0], b=[2.0]), replace(PLAN, base="other"), start=Fake).base == "a"


def test_a_base_that_differs_from_itself_raises_the_floor():
    # The fakes of the base share one list, so the second one, which comes last, is given its later values.
    calls = iter([[1.0], [1.3], [1.5]])
    case = Case.of("race", "laps/s", [Contestant(name, lambda: (next(calls), [])) for name in "ab"])
    result = measure(case, PLAN, start=Fake)
    assert result.floor == 1.5
    assert not result.verdict().winner


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("values", "why"), [([], "it has no wheels"), ([1.0, -1.0], "it fell over")])
def test_a_contestant_that_fails_is_absent_with_the_reason_and_the_others_go_on(values, why, fresh, fakes):
    if fresh and values:
        values = [-1.0]
    result = measure(case_of(a=values, b=[2.0], fresh=fresh), replace(PLAN, twin=False), start=Fake)
    assert result.absent == (Absent("a", why),)
    assert result.base == "b"
    assert result.samples == {"b": [2.0] * 11}
    assert all(fake.closed for fake in fakes)


@pytest.mark.parametrize("fresh", [False, True])
def test_an_interruption_closes_all(fresh, fakes):
    with pytest.raises(KeyboardInterrupt):
        measure(case_of(a=[1.0], b=[0.0], fresh=fresh), PLAN, start=Fake)
    assert fakes
    assert all(fake.closed for fake in fakes)


def test_a_fresh_case_starts_a_process_for_each_sample(fakes):
    measure(case_of(a=[1.0], b=[1.0], fresh=True), replace(PLAN, twin=False), start=Fake)
    assert len(fakes) == 22


class Clocked(Fake):
    """One whose clock is a fake: getting ready takes three times as long as a sample, whose value is its seconds."""

    now = 0.0

    def take(self, seconds, deadline):
        Clocked.now = min(Clocked.now + seconds, max(deadline, Clocked.now))
        if Clocked.now >= deadline:
            raise TimeUp

    def cost(self, deadline=math.inf):
        self.take(3 * self.values[0], deadline)
        return super().cost(deadline)

    def sample(self, deadline=math.inf):
        self.take(self.values[0], deadline)
        return super().sample(deadline)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(rounds, "monotonic", lambda: Clocked.now)


durations = st.lists(st.sampled_from([0.1, 1.0, 3.0, 20.0, 500.0]), min_size=1, max_size=6)


@pytest.mark.parametrize("fresh", [False, True])
@given(durations, st.sampled_from([0.5, 10.0, 100.0, 1000.0]))
def test_a_case_keeps_its_time_and_says_who_did_not_fit(fresh, seconds_of, seconds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "monotonic", lambda: Clocked.now)
        Clocked.now = 0.0
        values = {f"contestant {i}": [value] for i, value in enumerate(seconds_of)}
        result = measure(case_of(fresh=fresh, **values), replace(PLAN, seconds=seconds), start=Clocked)
    assert Clocked.now <= seconds + 1e-9
    absent = {entry.name: entry.why for entry in result.absent}
    assert {name for name in result.samples if not name.endswith(AGAIN)} | set(absent) == set(values)
    assert all("would exceed --minutes" in why for why in absent.values())
    assert all(result.samples.values())


def test_one_slow_contestant_leaves_the_others_their_time(clock):
    Clocked.now = 0.0
    case = case_of(base=[0.1], slow=[500.0], fast=[0.1], other=[0.2])
    result = measure(case, replace(PLAN, seconds=60.0), start=Clocked)
    assert [entry.name for entry in result.absent] == ["slow"]
    assert {len(result.ratios(name)) for name in ("fast", "other")} == {11}


def test_rivals_come_before_the_base_beside_itself():
    said = []
    measure(case_of(a=[1.0], b=[1.0]), PLAN, start=Fake, report=said.append)
    prepared = [line.removeprefix("race: preparing ") for line in said if "preparing" in line]
    assert prepared == ["a", "b", f"a{AGAIN}"]


def test_where_the_shares_are_too_short_for_anything_the_first_ones_are_measured(clock):
    Clocked.now = 0.0
    case = case_of(**{name: [3.0] for name in "abcdefgh"})
    result = measure(case, replace(PLAN, seconds=60.0, twin=False), start=Clocked)
    assert set(result.samples) >= {"a", "b"}
    assert {entry.name for entry in result.absent} >= {"g", "h"}


@pytest.mark.parametrize("fresh", [False, True])
def test_when_its_time_is_up_a_case_has_fewer_rounds_and_is_late(fresh, clock):
    Clocked.now = 0.0
    case = case_of(a=[1.0], b=[1.0], fresh=fresh)
    result = measure(case, replace(PLAN, seconds=50.0 if fresh else 20.0, twin=False), start=Clocked)
    assert result.late
    assert 1 <= len(result.samples["b"]) < 11


def test_a_base_without_a_rival_is_measured_alone():
    result = measure(case_of(a=[1.0], b=[]), replace(PLAN, twin=False), start=Fake)
    assert result.samples == {"a": [1.0] * 11}
    assert result.absent == (Absent("b", "it has no wheels"),)


def test_a_case_that_has_all_its_rounds_is_not_late():
    assert not measure(case_of(a=[1.0]), replace(PLAN, seconds=1000.0), start=Fake).late
