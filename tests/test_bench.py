"""`bench`: what may be said of samples, how they are taken, and the command as its users meet it."""

import json
import os
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from minitransformer.benchmark.case import Absent, Cost, Work, missing
from minitransformer.benchmark.peers import NanoGPT
from minitransformer.benchmark.report import growth_as_json, growth_table
from minitransformer.benchmark.scaling import Axis, Quantity, grow
from minitransformer.benchmark.subjects import Subject
from minitransformer.benchmark.subjects.tokenizers import texts_of
from minitransformer.benchmark.workers import ContestantFailed, TimeUp, Worker
from minitransformer.errors import UserError
from tests.bench_for_tests import LIMITS, TINY, alive

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
    with pytest.raises(TimeUp, match="would exceed --minutes"):
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
    said = r"^2 steps did not reach a validation loss \(nats per target\) of 0.001: raise --target-loss$"
    with pytest.raises(UserError, match=said):
        learning.seconds_to_loss(replace(TINY, data=str(text), target_loss=0.001), "classic")


def test_nanogpt_warms_up_decays_and_stays():
    from minitransformer.benchmark.stepping import nanogpt_rate

    assert nanogpt_rate(0) == pytest.approx(1e-3 / 101)
    assert nanogpt_rate(100) == pytest.approx(1e-3)
    assert nanogpt_rate(1050) == pytest.approx(5.5e-4)
    assert nanogpt_rate(2000) == nanogpt_rate(9999) == pytest.approx(1e-4)


def test_less_text_than_asked_is_an_error(text):
    with pytest.raises(UserError, match=r"has 0\.\d MB, less than --megabytes 5: lower it$"):
        list(texts_of(str(text), 5))


def test_peers_that_are_not_there_are_absent_with_the_reason():
    (case,) = Subject.named("training")(TINY).cases()
    assert Absent("nanoGPT", "give a checkout with --against") in case.absent


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
        (None, "is not a nanoGPT checkout, because it has no model.py"),
        ("class GPT: pass", "is not a nanoGPT checkout, because its model.py has no classes GPT and GPTConfig"),
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
    assert growth.stopped == "8 would exceed the time limit"


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
