"""`bench`: what may be said of samples, how they are taken, and the command as its users meet it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.benchmark import budget, rounds
from minitransformer.benchmark.case import Absent, BenchSetting, Case, Contestant, Cost, Work, missing
from minitransformer.benchmark.limits import Limits
from minitransformer.benchmark.peers import NanoGPT
from minitransformer.benchmark.report import case_table, picture
from minitransformer.benchmark.rounds import AGAIN, CaseResult, RoundsPlan, measure
from minitransformer.benchmark.scaling import Axis, Quantity, grow
from minitransformer.benchmark.scaling_report import growth_as_json, growth_table
from minitransformer.benchmark.shape import Shape
from minitransformer.benchmark.statistics import (
    Exponent,
    Spread,
    compare_rounds,
    least_rounds,
    median_interval,
    paired_ratio,
)
from minitransformer.benchmark.subjects import Subject
from minitransformer.benchmark.subjects.tokenizers import texts_of
from minitransformer.benchmark.workers import ContestantFailed, TimeUp, Worker
from minitransformer.commands import bench
from minitransformer.errors import UserError

PLAN = RoundsPlan(rounds=11, warmup=1)


# --- statistics


def test_quartiles_stand_around_the_median():
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(3, 2, 4)


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_exactly_twice_as_good_is_a_ratio_of_two_whatever_the_unit(lower_is_better):
    base = np.array([3.0, 1.0, 7.0, 2.0, 5.0, 4.0])
    values = base / 2 if lower_is_better else base * 2
    ratio = paired_ratio(values, base, lower_is_better=lower_is_better)
    assert (ratio.median, ratio.low, ratio.high) == (2, 2, 2)


def test_what_slows_a_whole_round_leaves_no_trace_in_paired_ratios():
    draws = np.random.default_rng(0)
    load = draws.uniform(1, 10, 15)
    ratio = paired_ratio(1.5 / load, 1 / load, lower_is_better=False)
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
    assert not compare_rounds({"a": same, "b": same}, lower_is_better=True).winner


def test_the_best_of_many_alike_is_called_in_no_more_than_one_of_twenty():
    draws = np.random.default_rng(2)
    called = sum(
        compare_rounds({name: draws.lognormal(0, 0.2, 13) for name in "abcd"}, lower_is_better=False).winner
        for _ in range(500)
    )
    assert called <= 25


def test_a_contestant_twice_as_good_in_noise_is_called():
    draws = np.random.default_rng(3)
    samples = {"slow": draws.lognormal(0, 0.1, 11), "fast": 2 * draws.lognormal(0, 0.1, 11)}
    found = compare_rounds(samples, lower_is_better=False)
    assert found.winner
    assert str(found).startswith("fast wins: ")


def test_a_lead_within_what_the_same_differs_by_from_itself_is_noise():
    samples = {"a": [1.0] * 11, "b": [1.1] * 11}
    assert compare_rounds(samples, lower_is_better=False, floor=1.05).winner
    found = compare_rounds(samples, lower_is_better=False, floor=1.2)
    assert not found.winner
    assert str(found) == "no winner: b and a are inside the noise"


def test_three_rounds_say_too_little():
    found = compare_rounds({"a": [1.0] * 3, "b": [2.0] * 3}, lower_is_better=False)
    assert str(found) == "no winner: 3 rounds say too little, and 6 are needed at least"


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_a_power_law_is_found(p, factor):
    sizes = [1, 2, 4, 8]
    found = Exponent.of(sizes, [factor * size**p for size in sizes])
    assert found.value == pytest.approx(p, abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-5)


def test_one_size_has_no_exponent():
    assert Exponent.of([2.0], [3.0]) is None


# --- rounds, with contestants whose clock is a fake


class Fake:
    """A contestant whose samples are numbers that it is given; it notes when it was asked."""

    def __init__(self, prepare):
        self.values, self.asked = prepare()
        self.closed = False
        Fake.all.append(self)

    def cost(self, deadline=math.inf):
        if not self.values:
            raise ContestantFailed("it has no wheels")
        return Cost(1.0, 2.0)

    def sample(self, deadline=math.inf):
        value = self.values[len(self.asked) % len(self.values)]
        self.asked.append(value)
        if value < 0:
            raise ContestantFailed("it fell over")
        if value == 0:
            raise KeyboardInterrupt
        return value

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def fakes():
    Fake.all = []
    return Fake.all


def case_of(lower_is_better=False, fresh=False, warmup=True, **values):
    contestants = [Contestant(name, partial(lambda row: (row, []), row)) for name, row in values.items()]
    return Case.of("race", "laps/s", contestants, lower_is_better=lower_is_better, fresh=fresh, warmup=warmup)


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
    for module in (rounds, budget):
        monkeypatch.setattr(module, "monotonic", lambda: Clocked.now)


durations = st.lists(st.sampled_from([0.1, 1.0, 3.0, 20.0, 500.0]), min_size=1, max_size=6)


@pytest.mark.parametrize("fresh", [False, True])
@given(durations, st.sampled_from([0.5, 10.0, 100.0, 1000.0]))
def test_a_case_keeps_its_time_and_says_who_did_not_fit(fresh, seconds_of, seconds):
    with pytest.MonkeyPatch.context() as patch:
        for module in (rounds, budget):
            patch.setattr(module, "monotonic", lambda: Clocked.now)
        Clocked.now = 0.0
        values = {f"contestant {i}": [value] for i, value in enumerate(seconds_of)}
        result = measure(case_of(fresh=fresh, **values), replace(PLAN, seconds=seconds), start=Clocked)
    assert Clocked.now <= seconds + 1e-9
    absent = {entry.name: entry.why for entry in result.absent}
    assert {name for name in result.samples if not name.endswith(AGAIN)} | set(absent) == set(values)
    assert all("would not fit into --minutes" in why for why in absent.values())
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


# --- workers


def steady():
    return Work(lambda: float(os.getpid()), Cost(1.0, 1.0))


def killed():
    return Work(lambda: os.kill(os.getpid(), signal.SIGKILL))


def sleepy(when):
    if when == "preparing":
        time.sleep(600)
    return Work(lambda: time.sleep(600))


def noisy():
    print("this would stand in the table")
    raise ValueError("bad day\nwith details")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_measures_in_one_process_of_its_own_and_leaves_none():
    worker = Worker(steady)
    assert worker.cost() == Cost(1.0, 1.0)
    pids = {int(worker.sample()), int(worker.sample())}
    assert len(pids) == 1
    assert os.getpid() not in pids
    worker.close()
    assert not alive(pids.pop())


def test_a_killed_worker_says_what_happened():
    worker = Worker(killed)
    worker.cost()
    with pytest.raises(ContestantFailed, match=r"^its process was killed, as happens when memory runs out$"):
        worker.sample()
    worker.close()


@pytest.mark.parametrize("asleep", ["preparing", "sampling"])
def test_a_worker_that_is_not_done_by_the_deadline_is_told_of_and_can_be_closed(asleep):
    worker = Worker(partial(sleepy, asleep))
    begun = time.monotonic()
    if asleep == "sampling":
        worker.cost()
    with pytest.raises(TimeUp, match="would not fit into --minutes"):
        (worker.cost if asleep == "preparing" else worker.sample)(time.monotonic() + 0.2)
    worker.close()
    assert time.monotonic() - begun < 30


def test_a_failing_worker_gives_one_line_with_the_place_and_prints_nothing(capfd):
    worker = Worker(noisy)
    with pytest.raises(ContestantFailed, match=r"^ValueError: bad day \(test_bench.py, line \d+\)$"):
        worker.cost()
    worker.close()
    assert capfd.readouterr().out == ""


# --- limits


LIMITS = Limits({"fp32": 100.0, "bf16": 200.0}, 10.0)


@pytest.mark.parametrize(
    ("cost", "share"),
    [
        (Cost(10.0, 0.1, "fp32"), 0.5),  # 10 units a second at most, by arithmetic
        (Cost(10.0, 0.1, "bf16"), 0.25),
        (Cost(1.0, 2.0, "fp32"), 1.0),  # 5 units a second at most, by reading
        (Cost(10.0, 0.1, "fp8"), None),
    ],
)
def test_the_share_of_the_limit_is_that_of_the_scarcer_resource(cost, share):
    assert LIMITS.share(cost, 5.0) == share


def test_our_costs_are_those_of_the_model():
    from minitransformer.benchmark import ours

    shape = TINY.shape
    weights = 12 * shape.d_model**2 + shape.vocab_size * shape.d_model  # of one block, and the head
    scores = 12 * shape.d_model
    assert ours.training_cost(shape, "fp32").flops == 6 * weights + scores * shape.context_length
    assert ours.decoding_cost(shape, "bf16", "fp32", "fp32", 0, 4).bytes == 2 * weights / 4
    written = ours.decoding_cost(shape, "int8", "bf16", "fp32", 12, 4)
    cached = 2 * 6 * shape.d_model * 4  # keys and values of half of the tokens
    assert written == Cost((6 * weights + scores * 6) / 3, weights / 4 + cached, "bf16")
    assert ours.reading_cost(shape, "fp32", "fp32", 1) == Cost(2 * weights + scores / 3, 4 * weights, "fp32")


# --- subjects, in tiny shapes


TINY = BenchSetting(Shape(1, 2, 16, 16, 31, 2), tokens=4, seconds=1e-6, megabytes=0.05, target_loss=3.4)
MODEL = """
class GPTConfig:
    def __init__(self, **settings):
        self.__dict__.update(settings)

class GPT:
    def __init__(self, config):
        self.config = config
    def to(self, device):
        return self
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    words = "to be or not to be that is the question whether it is nobler in the mind to suffer".split()  # noqa: SIM905
    draws = np.random.default_rng(0)
    path.write_text(" ".join(draws.choice(words, 30_000)))
    return path


IN_PROCESS = [name for name in sorted(Subject.registry) if name not in ("start-up", "time-to-loss")]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_contestant_of_ours_gives_a_sample(name, text):
    setting = replace(TINY, data=str(text))
    for case in Subject.named(name)(setting).cases():
        ours = [entry for entry in case.contestants if entry.name.startswith("ours") and "compiled" not in entry.name]
        assert ours, case.title
        for contestant in ours:
            work = contestant.prepare()
            assert work.sample() > 0, contestant.name
            assert work.cost is None or work.cost.flops > 0


def test_both_recipes_train_to_a_loss(text):
    from minitransformer.benchmark.learning import seconds_to_loss

    setting = replace(TINY, data=str(text), target_loss=2.7, shape=replace(TINY.shape, d_model=32, batch_size=8))
    assert seconds_to_loss(setting, "modern") > 0
    assert seconds_to_loss(replace(setting, target_loss=2.9), "classic") > 0


def test_a_loss_that_the_schedule_does_not_reach_is_an_error(text, monkeypatch):
    from minitransformer.benchmark import learning

    preset = learning.PRESETS["nanogpt-cpu"]
    short = replace(preset, training=replace(preset.training, steps=2, warmup_steps=0))
    monkeypatch.setitem(learning.PRESETS, "nanogpt-cpu", short)
    with pytest.raises(UserError, match=r"^2 steps did not reach a loss of 0.001: raise --target-loss$"):
        learning.seconds_to_loss(replace(TINY, data=str(text), target_loss=0.001), "classic")


def test_nanogpt_warms_up_decays_and_stays():
    from minitransformer.benchmark.stepping import nanogpt_rate

    assert nanogpt_rate(0) == pytest.approx(1e-3 / 101)
    assert nanogpt_rate(100) == pytest.approx(1e-3)
    assert nanogpt_rate(1050) == pytest.approx(5.5e-4)
    assert nanogpt_rate(2000) == nanogpt_rate(9999) == pytest.approx(1e-4)


def test_less_text_than_asked_is_an_error(text):
    with pytest.raises(UserError, match=r"has 0\.\d MB of the 5 asked: lower --megabytes$"):
        list(texts_of(str(text), 5))


def test_peers_that_are_not_there_are_absent_with_the_reason():
    (case,) = Subject.named("training")(TINY).cases()
    assert Absent("nanoGPT", "name a checkout with --against") in case.absent


def test_a_package_that_is_not_installed_is_named():
    assert missing("no_such_package", "peer").why == "no_such_package is not installed: pip install no_such_package"
    assert missing("json", "peer") is None


def test_nanogpt_is_imported_from_its_path(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    model = NanoGPT.at(tmp_path).model(TINY.shape, "cpu")
    assert model.config.n_embd == 16
    assert model.config.block_size == 16


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "is no nanoGPT, as it has no model.py"),
        ("class GPT: pass", "is no nanoGPT, as its model.py has no classes GPT and GPTConfig"),
        ("class (", "cannot be read as Python"),
    ],
)
def test_a_folder_that_is_no_nanogpt_is_refused(tmp_path, content, what):
    if content is not None:
        (tmp_path / "model.py").write_text(content)
    with pytest.raises(UserError) as error:
        NanoGPT.at(tmp_path)
    assert what in str(error.value)
    assert str(error.value).endswith("name a checkout of github.com/karpathy/nanoGPT")


# --- growth


class Square(Axis, name="square"):
    about = "toy"
    sizes = (1, 2, 4, 8, 16)
    size_unit = "m"

    def at(self, size):
        return replace(self.setting, megabytes=size)

    def quantities(self):
        return [
            Quantity("area", "m²", lambda at: 3.0 * at.megabytes**2),
            Quantity("side", "m", lambda at: 2.0),
            Quantity("late", "m", lambda at: max(1.0, at.megabytes / 8)),
        ]


Axis.registry.pop("square")


def here_and_now(prepare):
    return prepare().sample()


def test_growth_is_fitted_over_all_sizes_that_fit_the_budget():
    growth = grow(Square(TINY), 1000.0, measure=here_and_now)
    assert [size for size, _ in growth.points["area"]] == [1, 2, 4, 8, 16]
    assert growth.exponent("area").value == pytest.approx(2)
    assert growth.exponent("side").value == pytest.approx(0)
    assert growth.exponent("late").value < 0.5
    assert growth.last_exponent("late").value == pytest.approx(1)
    assert growth.stopped == "all sizes"


def test_tokens_of_a_vocabulary_beyond_16_bits_can_be_drawn():
    from minitransformer.benchmark.ours import training_tokens

    tokens = training_tokens(replace(TINY, shape=replace(TINY.shape, vocab_size=1 << 18)))
    assert 1 << 16 < tokens.max() < 1 << 18


def test_growth_stops_before_the_budget_is_spent():
    now = [0.0]

    def measure(prepare):
        value = prepare().sample()
        now[0] += value if value > 2 else 0
        return value

    growth = grow(Square(TINY), 100.0, measure=measure, clock=lambda: now[0])
    # 3 + 12 + 48 s are spent, and the next would take at least 96 s.
    assert [size for size, _ in growth.points["area"]] == [1, 2, 4]
    assert growth.stopped == "8 would not fit into the budget"


def test_a_size_that_fails_ends_its_axis_with_the_reason():
    def measure(prepare):
        value = prepare().sample()
        if value > 10:
            raise ContestantFailed("its process was killed, as happens when memory runs out")
        return value

    growth = grow(Square(TINY), 100.0, measure=measure)
    assert growth.points["area"] == [(1, 3.0)]
    assert growth.stopped == "at 2: its process was killed, as happens when memory runs out"
    assert growth.exponent("area") is None


@pytest.mark.parametrize("name", sorted(Axis.registry))
def test_every_axis_measures_its_smallest_size(name, text, monkeypatch):
    from minitransformer.benchmark import scaling

    monkeypatch.setattr(scaling, "LEAST_SECONDS", 0.0)
    axis = Axis.named(name)(replace(TINY, data=str(text)))
    monkeypatch.setattr(type(axis), "sizes", (32, 64) if name == "context" else (1,))
    if name != "corpus":  # which wants a whole MB
        growth = grow(axis, 1e-9, measure=here_and_now)
        assert all(points and points[0][1] >= 0 for points in growth.points.values()), growth.stopped


def test_the_table_of_growth_fits_into_80_columns():
    lines = list(growth_table([grow(Square(TINY), 1000.0, measure=here_and_now)]))
    assert max(map(len, lines)) <= 80
    assert any("2.00 ± 0.00" in line for line in lines)
    json.dumps(growth_as_json([grow(Square(TINY), 1000.0, measure=here_and_now)]), allow_nan=False)


# --- the command


class Race(Subject, name="race"):
    about = "toy"

    def cases(self):
        entries = [
            Contestant("tortoise", partial(racing, 1.0), base=True),
            Contestant("hare", partial(racing, 2.0)),
            Absent("rabbit", "it has a long reason that is told in a line which has to be folded, as it is so long"),
        ]
        yield Case.of("a race", "laps/s", entries)


Subject.registry.pop("race")


def racing(speed):
    return Work(lambda: speed, Cost(5.0, 0.0))


@pytest.fixture
def race(monkeypatch):
    monkeypatch.setitem(Subject.registry, "race", Race)
    monkeypatch.setattr(bench, "measure_limits", lambda device: LIMITS)


def run(*arguments):
    return bench.main(["--device", "cpu", *map(str, arguments)])


def test_the_command_prints_one_table_of_80_columns_and_writes_every_sample(race, tmp_path, capsys):
    assert run("--only", "race", "--rounds", 6, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "hare wins: 2 [2–2] times as good as tortoise" in out
    assert re.search(r"^hare +2\.00 \[2\.00–2\.00\] +2 \[2–2\] +10%$", out, re.MULTILINE)
    assert "not measured: rabbit (it has a long reason" in out
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert case["contestants"]["hare"]["samples"] == [2.0] * 6
    assert case["winner"] == "hare"
    assert not case["late"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_contestants_for_which_there_is_no_time_are_left_out_in_the_table_and_in_json(race, tmp_path, capsys):
    assert run("--only", "race", "--rounds", 6, "--minutes", 1e-9, "--json", tmp_path / "a.json") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "not measured: tortoise, hare (it would not fit into --minutes: give more" in out
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert set(case["not_measured"]) == {"tortoise", "hare", "rabbit"}


def test_fewer_rounds_for_want_of_time_are_said():
    result = CaseResult(case_of(a=[1.0], b=[1.0]), "a", {"a": [1.0] * 5, "b": [1.0] * 5}, {"b": [1.0] * 5}, late=True)
    assert "5 rounds: the time of this case was up (--minutes)" in list(case_table(result, None))


def lines_of(figure):
    """Each horizontal line that the picture has."""
    lines = [(line.get_linestyle(), *line.get_data()) for line in figure.axes[0].lines]
    return [(style, list(x)) for style, x, y in lines if style != "None" and len(set(x)) == 2 and len(set(y)) == 1]


@pytest.mark.parametrize(
    ("rounds", "style", "words"), [(6, "-", "95 % interval"), (4, ":", "dotted: from the lowest to the highest")]
)
def test_the_picture_draws_what_its_legend_speaks_of(rounds, style, words):
    samples = {"a": [1.0] * rounds, "b": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0][:rounds]}
    figure = picture([CaseResult(case_of(a=[1.0], b=[2.0]), "a", samples, {"b": samples["a"]})])
    assert lines_of(figure) == [(style, [2.0, samples["b"][-1]])]
    label = figure.axes[0].get_xlabel()
    assert words in label
    assert ("95 %" in label) == (style == "-")


def test_few_rounds_name_no_winner_and_their_json_is_valid(race, tmp_path, capsys):
    assert run("--only", "race", "--rounds", 2, "--json", tmp_path / "a.json") == 0
    assert "no winner: 2 rounds say too little, and 6 are needed at least" in capsys.readouterr().out
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert content["cases"][0]["contestants"]["hare"]["ratio"]["high"] is None


def test_more_than_the_limit_is_said_to_be_no_share_of_it(race, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_limits", lambda device: Limits({"fp32": 8.0}, 1.0))
    assert run("--only", "race", "--rounds", 1) == 0
    assert "above 100 % of the limit" in capsys.readouterr().out


def test_results_come_as_they_are_measured_and_in_a_pipe_the_subjects_are_said(race, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(bench, "measure", lambda *a, **k: (said.append(capsys.readouterr()), measure(*a, **k))[1])
    assert run("--only", "race", "race", "--rounds", 3) == 0
    said.append(capsys.readouterr())
    assert ["limits " in part.out for part in said] == [True, False, False]
    assert ["hare" in part.out for part in said] == [False, True, True]
    assert [part.err for part in said] == ["measuring: limits of the machine\n", "measuring: a race\n", ""]


def test_contestants_are_chosen_by_patterns(race, capsys):
    assert run("--only", "race", "--rounds", 1, "--contestants", "tor*") == 0
    out = capsys.readouterr().out
    assert "tortoise has nothing to be compared with" in out
    assert "hare" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "trianing"], "unknown subject 'trianing': did you mean 'training'?"),
        (["--scaling", "--only", "contxt"], "unknown axis 'contxt': did you mean 'context'?"),
        (["--shape", "nanogpt-gp"], "unknown shape 'nanogpt-gp': did you mean 'nanogpt-gpu'?"),
        (["--against", "/nowhere"], "/nowhere is no nanoGPT, as it has no model.py"),
        (["--contestants", "our fp32"], "unknown contestant 'our fp32': did you mean 'ours fp32'?"),
        (["--base", "nanogpt"], "unknown contestant 'nanogpt': did you mean 'nanoGPT'?"),
        (["--rounds", "0"], "--rounds is 0: give 1 or more"),
        (["--minutes", "0"], "--minutes is 0.0: it must be above 0"),
        (["--target-loss", "-1"], "--target-loss is -1.0: it must be above 0"),
        (["--json", "/no/such/a.json"], "/no/such/a.json cannot be written, as there is no folder /no/such"),
    ],
)
def test_mistakes_are_answered_in_a_sentence_before_anything_is_measured(arguments, sentence, capsys):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys; from minitransformer.commands import bench; "
        "assert bench.main(['--device', 'cpu', '--only', 'x']) == 2; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


class Endless(Subject, name="endless"):
    about = "toy"

    def cases(self):
        yield Case.of("a long race", "laps/s", [Contestant("sloth", partial(crawling, self.setting.data))])


Subject.registry.pop("endless")


def crawling(folder):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(folder) / f"{sleeper.pid}").touch()
    (Path(folder) / f"{os.getpid()}").touch()
    return Work(lambda: time.sleep(600))


def run_endless(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    Subject.registry["endless"] = Endless
    bench.measure_limits = lambda device: LIMITS
    return run("--only", "endless", "--data", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(number, tmp_path):
    code = f"import sys; from tests.test_bench import run_endless; sys.exit(run_endless({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: len(list(tmp_path.iterdir())) >= 2)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"interrupted: 0 of 1 cases are measured" in errors
    wait_until(lambda: not any(map(alive, pids)))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
