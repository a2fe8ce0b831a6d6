"""Training that diverges: it stops, says how to go on, and keeps a checkpoint from before."""

import json
import math

import pytest
import torch

from minitransformer.training.checkpoint import checkpoint_step, checkpoints_in
from minitransformer.training.divergence import NonFiniteTraining, are_finite
from minitransformer.training.logging import RunFiles
from minitransformer.training.optimizers import Optimizer
from tests.runs_for_tests import assert_same_weights, call_after_step, configured, metrics, trainer_for, weights_after

pytestmark = pytest.mark.unchecked_shapes


def test_training_that_stays_non_finite_ends_with_the_weights_it_had(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, eval_every=1000, save_every=1000))
    before = weights_after(trainer)
    trainer.learner.objective.loss_sum = lambda model, batch: model(batch.inputs).sum() * math.nan
    with pytest.raises(NonFiniteTraining, match=r"train again with lower learning rates, such as --lr 0\.001$"):
        trainer.train()
    assert_same_weights(before, weights_after(trainer))
    assert trainer.progress.step == trainer.config.max_skipped_steps
    assert all(record["loss"] is None for record in metrics(tmp_path / "run"))
    assert not list((tmp_path / "run/checkpoints").iterdir())


def broken_from(trainer, step):
    """The loss is NaN in all steps after `step`."""
    loss_sum = trainer.learner.objective.loss_sum
    trainer.learner.objective.loss_sum = lambda model, batch: (
        loss_sum(model, batch) * (math.nan if trainer.progress.step >= step else 1)
    )


def checkpoint_steps(path):
    return [checkpoint_step(checkpoint) for checkpoint in checkpoints_in(path / "checkpoints")]


def test_the_last_checkpoint_from_before_the_first_skipped_step_is_kept(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=1, eval_every=100))
    broken_from(trainer, 7)
    with pytest.raises(NonFiniteTraining):
        trainer.train()
    # Step 8 was the first to be skipped; what came of step 7 may be why, what came of step 6 is not.
    assert checkpoint_steps(tmp_path / "run") == [6, 25, 26]


def test_a_run_that_has_recovered_keeps_no_more_checkpoints_than_others(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=12, save_every=1, eval_every=6))
    loss_sum = trainer.learner.objective.loss_sum
    trainer.learner.objective.loss_sum = lambda model, batch: (
        loss_sum(model, batch) * (math.inf if trainer.progress.step == 3 else 1)
    )
    trainer.train()
    assert trainer.progress.best_step == 12
    assert checkpoint_steps(tmp_path / "run") == [11, 12]


def test_no_checkpoint_is_offered_whose_weights_are_lost(text, tmp_path):
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=3, eval_every=100))
    table = trainer.learner.model.embedding.table.weight
    call_after_step(trainer, 9, lambda: table.data.mul_(1e38))
    with pytest.raises(NonFiniteTraining, match=r"--checkpoint step-000006 --lr 0\.001$"):
        trainer.train()
    assert checkpoint_steps(tmp_path / "run") == [6, 24, 27]


@pytest.mark.parametrize("optimizer", Optimizer.registry)
def test_weights_that_an_update_made_infinite_are_not_saved(text, tmp_path, optimizer):
    config = configured(optimizer=optimizer, tied_embeddings=False, steps=50, save_every=4, eval_every=25)
    trainer = trainer_for(tmp_path / "run", text, config)
    of_a_token_that_the_text_has_not = trainer.learner.model.embedding.table.weight.data[-1]
    call_after_step(trainer, 6, lambda: of_a_token_that_the_text_has_not.fill_(math.nan))
    with pytest.raises(
        NonFiniteTraining, match=r"after step 8, .* not saved; .* --checkpoint step-000004 --lr 0\.001$"
    ):
        trainer.train()
    assert checkpoint_steps(tmp_path / "run") == [4]
    assert (tmp_path / "run/checkpoints/latest").resolve().name == "step-000004"


def test_large_weights_are_finite_though_their_norm_is_not():
    large = torch.full((4,), 3e38)
    assert are_finite([large, torch.ones(2)])
    for number in (math.nan, math.inf, -math.inf):
        assert not are_finite([large, torch.tensor([1.0, number])])


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path):
    log = RunFiles(tmp_path, resume_at=0)
    log.record({"step": 1, "loss": math.nan, "probe/gradient-norm": -math.inf, "accuracy": None, "tokens": 5})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {
        **{"step": 1, "loss": None, "probe/gradient-norm": None, "accuracy": None, "tokens": 5}
    }
