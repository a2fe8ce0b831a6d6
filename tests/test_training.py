"""A training run: it learns, it keeps the checkpoints that it should, and interruptions leave no trace."""

import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.training.checkpoint import choose_checkpoint
from minitransformer.training.optimizers import Optimizer
from minitransformer.training.signals import StopRequest
from tests.runs_for_tests import (
    assert_same_weights,
    call_after_step,
    configured,
    metrics,
    trainer_for,
    validation_of,
    weights_after,
)

pytestmark = pytest.mark.unchecked_shapes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_every_precision_learns_the_text(text, tmp_path, precision):
    trainer = trainer_for(tmp_path / "run", text, configured(precision=precision, steps=60, eval_every=60))
    trainer.train()
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] - 1.5
    assert {p.dtype for p in trainer.learner.model.parameters()} == {torch.float32}


@settings(max_examples=8)
@given(
    stop_at=st.integers(1, 11),
    dropout=st.sampled_from([0.0, 0.3]),
    grad_accumulation=st.integers(1, 3),
    precision=st.sampled_from(["fp32", "bf16", "fp8"]),
    optimizer=st.sampled_from(sorted(Optimizer.registry)),
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    text, tmp_path_factory, stop_at, dropout, grad_accumulation, precision, optimizer
):
    folder = tmp_path_factory.mktemp("runs")
    config = configured(dropout=dropout, grad_accumulation=grad_accumulation, precision=precision, optimizer=optimizer)
    whole = trainer_for(folder / "whole", text, config)
    whole.train()

    stop = StopRequest()
    first = trainer_for(folder / "parts", text, config, stop)
    call_after_step(first, stop_at, lambda: setattr(stop, "signal", signal.SIGINT))
    first.train()
    assert first.progress.step == stop_at
    torch.manual_seed(stop_at)  # whatever happened in between
    second = trainer_for(folder / "parts", text, config, resume_at=stop_at)
    second.restore(choose_checkpoint(folder / "parts/checkpoints"))
    second.train()

    assert_same_weights(weights_after(whole), weights_after(second))
    for left, right in zip(whole.learner.optimizers, second.learner.optimizers, strict=True):
        left, right = left.state_dict(), right.state_dict()
        assert left["param_groups"] == right["param_groups"]
        for index in left["state"]:
            assert_same_weights(left["state"][index], right["state"][index])
    assert metrics(folder / "whole") == metrics(folder / "parts")


def test_a_run_may_be_extended(text, tmp_path):
    short, long = configured(steps=6, schedule="constant"), configured(steps=12, schedule="constant")
    trainer_for(tmp_path / "run", text, short).train()
    extended = trainer_for(tmp_path / "run", text, long, resume_at=6)
    extended.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    extended.train()
    whole = trainer_for(tmp_path / "whole", text, long)
    whole.train()
    assert_same_weights(weights_after(extended), weights_after(whole))


def test_a_changed_learning_rate_holds_after_resuming(text, tmp_path):
    trainer_for(tmp_path / "run", text, configured(steps=6, schedule="constant")).train()
    resumed = trainer_for(tmp_path / "run", text, configured(lr=5e-4, schedule="constant"), resume_at=6)
    resumed.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    resumed.train()
    assert metrics(tmp_path / "run")[-2]["lr"] == pytest.approx(5e-4)


def test_two_seeds_differ_and_one_seed_does_not(text, tmp_path):
    def trained(name, seed):
        trainer = trainer_for(tmp_path / name, text, configured(seed=seed, steps=3))
        trainer.train()
        return weights_after(trainer)

    assert_same_weights(trained("a", 1), trained("b", 1))
    assert not torch.equal(trained("c", 2)["embedding.table.weight"], trained("d", 3)["embedding.table.weight"])


def test_a_run_stops_early_when_validation_no_longer_improves(text, tmp_path):
    config = configured(lr=1e-12, steps=100, eval_every=1, patience=3, save_every=100, warmup_steps=0)
    trainer = trainer_for(tmp_path / "run", text, config)
    losses = iter([3.0, 2.0, 2.5, 2.1, 2.2, 1.0])
    trainer._validate = lambda: trainer._note(validation_of(next(losses)))
    trainer.train()
    assert trainer.stopped_early
    assert (trainer.progress.step, trainer.progress.best_step) == (5, 2)
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step-000002"
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-000005"


def test_the_last_k_checkpoints_and_the_best_one_are_kept(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(save_every=1, keep_last=3, eval_every=5))
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    best = (tmp_path / "run/checkpoints/best").resolve().name
    assert names == sorted({best, "step-000010", "step-000011", "step-000012"})


def stopped_in_its_first_validation(path, text, config):
    with StopRequest() as stop:
        trainer = trainer_for(path, text, config, stop)
        batches = trainer.learner.loader.validation_batches

        def interrupted():
            signal.raise_signal(signal.SIGTERM)
            return batches()

        trainer.learner.loader.validation_batches = interrupted
        trainer.train()
        assert stop.exit_code == 143
    assert trainer.validation is None


def test_a_signal_during_validation_does_not_wait_for_it_and_loses_nothing(text, tmp_path):
    config = configured(eval_every=4, save_every=100)
    whole = trainer_for(tmp_path / "whole", text, config)
    whole.train()
    stopped_in_its_first_validation(tmp_path / "parts", text, config)
    second = trainer_for(tmp_path / "parts", text, config, resume_at=4)
    second.restore(choose_checkpoint(tmp_path / "parts/checkpoints"))
    second.train()
    assert_same_weights(weights_after(whole), weights_after(second))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_the_best_checkpoint_is_kept_though_a_signal_came_in_its_validation(text, tmp_path):
    config = configured(eval_every=4, save_every=100, keep_last=1)
    stopped_in_its_first_validation(tmp_path / "run", text, config)
    second = trainer_for(tmp_path / "run", text, config, resume_at=4)
    second.restore(choose_checkpoint(tmp_path / "run/checkpoints"))
    second.train(until=5)
    assert second.progress.best_step == 4
    assert choose_checkpoint(tmp_path / "run/checkpoints", "best").name == "step-000004"


def test_a_run_goes_on_from_the_checkpoint_that_was_chosen_for_it(text, tmp_path):
    config = configured(save_every=2, steps=6, keep_last=3)
    trainer_for(tmp_path / "run", text, config).train()
    second = trainer_for(tmp_path / "run", text, config, resume_at=4)
    second.restore(choose_checkpoint(tmp_path / "run/checkpoints", "step-000004"))
    second.train(until=4)  # stopped at once
    assert choose_checkpoint(tmp_path / "run/checkpoints").name == "step-000004"
