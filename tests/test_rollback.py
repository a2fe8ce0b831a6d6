"""Rollbacks: training goes back to a checkpoint from before a divergence, and skips the data."""

import math
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.training import loop
from minitransformer.training.black_box import BLACK_BOX
from minitransformer.training.checkpoint import checkpoint_step, choose_checkpoint, load_trainer_state
from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.signals import StopRequest
from minitransformer.training.spikes import Rollback
from tests.runs_for_tests import assert_same_weights, call_after_step, configured, metrics, trainer_for, weights_after

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
    assert len(calls) == stop_at
    second = poisoned(trainer_for(folder / "parts", text, config, resume_at=done), 9, 10, factor=factor)
    second.restore(choose_checkpoint(folder / "parts/checkpoints"))
    second.train()
    assert second.progress.rollbacks == whole.progress.rollbacks == 1
    assert second.learner.skipped_batches == whole.learner.skipped_batches == 5
    assert_same_weights(weights_after(whole), weights_after(second))
    assert metrics(folder / "parts") == metrics(folder / "whole")


@pytest.mark.parametrize("factor", [math.nan, 50.0])
def test_after_so_many_rollbacks_the_run_ends(text, tmp_path, factor):
    config = configured(**ROLLBACK, rollback_limit=2)
    trainer = poisoned(trainer_for(tmp_path / "run", text, config), *{9, 10, 14, 15, 19, 20}, factor=factor)
    with pytest.raises(NonFiniteTraining, match=r"; there were 2 rollbacks; .*continue from before it"):
        trainer.train()
    assert trainer.progress.rollbacks == 2
    # A loss that is only too high has no module in which it began.
    assert (tmp_path / "run" / BLACK_BOX).exists() == math.isnan(factor)


def test_without_a_checkpoint_from_before_the_run_ends(text, tmp_path):
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**ROLLBACK)), 1, 2)
    with pytest.raises(NonFiniteTraining, match=r"no checkpoint from before can go on with other data; .*train again"):
        trainer.train()


@given(margin=st.integers(0, 30), save_every=st.integers(1, 12), start=st.integers(2, 200))
def test_a_checkpoint_is_kept_that_is_old_enough_and_not_much_older(margin, save_every, start):
    """Whatever has been removed before: of all checkpoints, those that are kept at each save."""
    policy = Rollback.choose(margin=margin).make()
    kept = set()
    for step in range(1, start):
        if step % save_every == 0:
            kept.add(step)
            needed = policy.needed_before(step + 1, save_every)
            kept = {max((each for each in kept if each < before), default=0) for before in needed} - {0}
            assert len(kept) <= policy.spare_checkpoints
    old = max((step for step in kept if step < start - margin), default=0)
    assert start - margin - 1 - old < 2 * save_every + margin
    if start > save_every:
        assert max(kept) >= start - save_every


def test_a_run_goes_back_to_a_checkpoint_that_is_old_enough(text, tmp_path):
    config = {**ROLLBACK, "rollback_margin": 8, "keep_last": 1}
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**config)), 18, 19)
    trainer.train()
    assert [row["step"] for row in metrics(tmp_path / "run") if "rollback" in row] == [9]


def test_a_rollback_forgets_a_best_validation_whose_checkpoint_it_removes(text, tmp_path):
    config = {**ROLLBACK, "eval_every": 2, "keep_last": 1, "steps": 13}
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**config)), 9, 10)
    trainer.train()
    best = tmp_path / "run/checkpoints/best"
    assert checkpoint_step(best.resolve()) == trainer.progress.best_step > 0
    validations = [row["step"] for row in metrics(tmp_path / "run") if "validation_loss" in row]
    assert validations == [2, 4, 6, 8, 10, 12, 13]


@pytest.mark.parametrize("moment", ["remove_later_checkpoints", "rewind", "record", "_save"])
def test_a_kill_within_a_rollback_repeats_it_and_says_it_once(text, tmp_path, monkeypatch, moment):
    whole = poisoned(trainer_for(tmp_path / "whole", text, configured(**ROLLBACK)), 9, 10)
    whole.train()
    first = poisoned(trainer_for(tmp_path / "run", text, configured(**ROLLBACK)), 9, 10)
    owner = {"remove_later_checkpoints": loop, "rewind": first.log, "record": first.log, "_save": first}[moment]
    do = getattr(owner, moment)

    def killed(*given):
        if moment == "record" and "rollback" not in given[0]:
            return do(*given)
        if moment == "_save" and not first.learner.skipped_batches:
            return do(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            first.train()
    chosen = choose_checkpoint(tmp_path / "run/checkpoints")
    second = trainer_for(tmp_path / "run", text, configured(**ROLLBACK), resume_at=checkpoint_step(chosen))
    poisoned(second, 9, 10).restore(chosen)
    second.train()
    assert_same_weights(weights_after(whole), weights_after(second))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_checkpoint_says_what_is_skipped(text, tmp_path):
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**ROLLBACK)), 9, 10)
    trainer.train()
    state = load_trainer_state(choose_checkpoint(tmp_path / "run/checkpoints"))
    assert state["skipped_batches"] == 5
    assert state["progress"]["rollbacks"] == 1


def test_weights_that_are_not_finite_go_back_too(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(**ROLLBACK, tied_embeddings=False))
    table = trainer.learner.model.embedding.table.weight
    call_after_step(trainer, 10, lambda: trainer.progress.rollbacks or table.data[-1].fill_(math.nan))
    trainer.train()
    rows = [row for row in metrics(tmp_path / "run") if "rollback" in row]
    assert [(row["step"], row["rolled_back_from"]) for row in rows] == [(9, 12)]
    assert all(weight.isfinite().all() for weight in weights_after(trainer).values())


# --- what a spike is


def high(losses, **changes):
    policy = Rollback.choose(**{"window": 4, **changes}).make()
    return policy.is_high(losses[-1], losses[:-1])


def test_a_loss_is_high_far_above_the_mean_of_those_before_measured_by_their_deviation():
    assert not high([2.0, 3.0, 2.0, 3.0, 2.5 + 7 * 0.5])
    assert high([2.0, 3.0, 2.0, 3.0, 2.5 + 7 * 0.5 + 1e-9])
    assert high([2.0, 3.0, 2.0, 3.0, 4.1], deviations=3.0)
    assert not high([2.0, 3.0, 2.0, 3.0, -100.0])
    assert not high([2.0, 2.0, 2.0, 100.0])  # too few to compare with


def test_a_single_high_loss_is_no_spike_and_does_not_blur_the_next(text, tmp_path):
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(**ROLLBACK)), 9, 11, factor=50.0)
    trainer.train()
    assert trainer.progress.rollbacks == 0
    assert max(trainer.progress.recent_losses) < 10


def test_by_default_a_spike_of_the_loss_ends_nothing(text, tmp_path):
    trainer = poisoned(trainer_for(tmp_path / "run", text, configured(steps=20)), *range(9, 15), factor=50.0)
    trainer.train()
    assert trainer.progress.step == 20
    assert trainer.progress.recent_losses == []
