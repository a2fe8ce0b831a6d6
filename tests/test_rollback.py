"""Rollbacks: training goes back to a checkpoint from before a divergence, and skips the data."""

import math
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.training.black_box import BLACK_BOX
from minitransformer.training.checkpoint import choose_checkpoint
from minitransformer.training.signals import StopRequest
from tests.runs_for_tests import assert_same_weights, configured, metrics, trainer_for, weights_after

pytestmark = pytest.mark.unchecked_shapes
ROLLBACK = {
    **{"on_spike": "rollback", "rollback_margin": 2, "rollback_window": 4, "rollback_patience": 2},
    **{"max_skipped_steps": 2, "steps": 20, "save_every": 3, "eval_every": 100, "keep_last": 3},
}


def poisoned(trainer, *indices, factor=math.nan):
    """The data of these steps, counted from 0, spoils the loss."""
    loader, loss_sum = trainer.learner.loader, trainer.learner.objective.loss_sum
    bad = {loader.training_batches(index)[0].inputs.sum().item() for index in indices}
    trainer.learner.objective.loss_sum = lambda model, batch: (
        loss_sum(model, batch) * (factor if batch.inputs.sum().item() in bad else 1)
    )
    return trainer


def seen_batches(trainer):
    """The indices of the data that the trainer asks for, in order."""
    asked, batches = [], trainer.learner.loader.training_batches

    def watched(index):
        asked.append(index)
        return batches(index)

    trainer.learner._batches = watched
    return asked


def steps_of(path):
    return [record["step"] for record in metrics(path) if "loss" in record]


@pytest.mark.parametrize("factor", [math.nan, 50.0])
def test_a_divergence_goes_back_and_skips_its_data_and_that_in_between(text, tmp_path, factor):
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**ROLLBACK)), 9, 10, factor=factor)
    asked = seen_batches(trainer)
    trainer.train()
    # Steps 10 and 11 are bad: step 6 is the last checkpoint more than 2 steps before.
    assert asked == [*range(11), *range(11, 25)]
    assert trainer.progress.step == 20
    assert trainer.progress.rollbacks == 1
    rows = metrics(tmp_path / "run")
    assert [row for row in rows if "rollback" in row] == [
        {"step": 6, "rollback": 1, "rolled_back_from": 11, "skipped_batches": 5}
    ]
    assert steps_of(tmp_path / "run") == list(range(1, 21))
    assert all(row["loss"] < 10 for row in rows if "loss" in row)
    assert "back to step 6, and the data of 5 steps is skipped" in (tmp_path / "run/train.log").read_text()
    assert not (tmp_path / "run" / BLACK_BOX).exists()


def test_the_weights_are_those_of_a_run_that_never_saw_the_data(text, tmp_path):
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**ROLLBACK)), 9, 10)
    trainer.train()
    spared = trainer_for(tmp_path / "spared", text, configured(**ROLLBACK))
    batches = spared.learner.loader.training_batches
    spared.learner._batches = lambda index: batches(index if index < 6 else index + 5)
    spared.train()
    assert_same_weights(weights_after(trainer), weights_after(spared))


@settings(max_examples=12)
@given(stop_at=st.integers(1, 24), factor=st.sampled_from([math.nan, 50.0]), log_every=st.sampled_from([1, 3, 7]))
def test_an_interrupted_run_goes_back_as_an_uninterrupted_one_and_skips_the_same_data(
    text, tmp_path_factory, stop_at, factor, log_every
):
    folder = tmp_path_factory.mktemp("runs")
    config = configured(**{**ROLLBACK, "log_every": log_every, "dropout": 0.1})
    whole = poisoned(trainer_for(folder / "whole", text, config), 9, 10, factor=factor)
    whole.train()
    stop, calls = StopRequest(), []
    first = poisoned(trainer_for(folder / "parts", text, config, stop), 9, 10, factor=factor)
    step = first.learner.step

    def stopped(given):
        result = step(given)
        calls.append(first.learner.steps_done)
        if len(calls) == stop_at:
            stop.signal = signal.SIGINT
        return result

    first.learner.step = stopped
    first.train()
    done = first.progress.step
    assert calls[-1] == done or first.progress.rollbacks
    second = poisoned(trainer_for(folder / "parts", text, config, resume_at=done), 9, 10, factor=factor)
    second.restore(choose_checkpoint(folder / "parts/checkpoints"))
    second.train()
    assert second.progress.rollbacks == whole.progress.rollbacks == 1
    assert second.learner.skipped_batches == whole.learner.skipped_batches == 5
    assert_same_weights(weights_after(whole), weights_after(second))
    if stop_at != 8 or log_every == 1:  # a checkpoint at another step is another one to go back to
        assert steps_of(folder / "parts") == steps_of(folder / "whole")
