"""One learner: what a step needs is made once, and whoever drives it gets the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minitransformer.architecture.residual import PreLN, Residual
from minitransformer.runs import Run
from minitransformer.training import progress, validation
from minitransformer.training.checkpoint import choose_checkpoint, load_trainer_state, write_checkpoint
from minitransformer.training.learner import Learner
from minitransformer.training.loop import Trainer
from tests.runs_for_tests import TINY, configured, learner_for, trainer_for

pytestmark = pytest.mark.unchecked_shapes


def steps(learner: Learner, count: int) -> list[float]:
    return [learner.step(learner.next_batches()).loss.item() for _ in range(count)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_learner_that_is_given_a_state_goes_on_as_the_one_that_had_it(text: Any, optimizer: str) -> None:
    config = configured(optimizer=optimizer, dropout=0.3)
    first, second = learner_for(text, config), learner_for(text, config)
    steps(first, 4)
    second.load_state_dict(deepcopy(first.state_dict()))
    second.model.load_state_dict(first.model.state_dict())
    assert second.steps_done == 4
    assert steps(first, 3) == steps(second, 3)
    assert same(weights(first.model), weights(second.model))


def test_what_happens_between_two_steps_changes_neither(text: Any) -> None:
    config = configured(dropout=0.3)
    quiet, disturbed = learner_for(text, config), learner_for(text, config)
    losses = steps(quiet, 3)
    for loss in losses:
        torch.manual_seed(17)
        assert steps(disturbed, 1) == [loss]


def test_initial_weights_take_the_place_of_those_that_are_drawn_and_calibrated(text: Any, tmp_path: Path) -> None:
    config = configured(residual="admin")
    parent = learner_for(text, config)
    steps(parent, 3)
    initial = write_checkpoint(tmp_path, 0, parent.model, {}, config)
    learner = learner_for(text, configured(config, seed=5), initial=initial)
    assert same(weights(learner.model), weights(parent.model))
    assert learner.steps_done == 0


def test_a_trainer_measures_no_machine_and_reads_no_batch_until_it_trains(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    learner = learner_for(text)
    monkeypatch.setattr(progress, "peak_flops", lambda *_: asked.append("the machine") or 1.0)
    monkeypatch.setattr(learner, "next_batches", lambda: asked.append("a batch"))
    Trainer(tmp_path, learner, validation.Log(), None, None)  # type: ignore[arg-type]
    assert not asked


@pytest.fixture
def growing() -> Iterator[type[Residual]]:
    """A placement that follows training."""

    class Growing(PreLN, name="toy-growing"):
        """x ← x + α_t f(N(x)), where α_t grows with the step, and a weight that is set to 1 after each."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.norm_of_branch = nn.Parameter(torch.ones(()))
            self.register_buffer("share", torch.zeros(()))
            self.seen: list[int] = []

        def forward(self, x: torch.Tensor, sublayer: Any) -> torch.Tensor:
            return x + self.share * self.norm_of_branch * self.dropout(sublayer(self.norm(x)))

        def begin_step(self, step: int) -> None:
            self.seen.append(step)
            self.share.fill_((step + 1) / TINY.training.steps)

        @torch.no_grad()
        def end_step(self, model: nn.Module) -> None:
            self.norm_of_branch.div_(self.norm_of_branch.abs())

    yield Growing
    del Residual.registry["toy-growing"]


def branch(trainer: Trainer) -> Any:
    return trainer.learner.model.stack.blocks[1].attention_residual


def test_modules_are_told_of_every_step_by_the_same_number_after_a_resume(
    growing: type[Residual], text: Any, tmp_path: Path
) -> None:
    config = configured(residual="toy-growing", dropout=0.1)
    whole = trainer_for(tmp_path / "whole", text, config)
    whole.train()
    assert branch(whole).seen == list(range(config.training.steps))
    assert branch(whole).norm_of_branch == 1.0
    trainer_for(tmp_path / "parts", text, config).train(until=5)
    second = trainer_for(tmp_path / "parts", text, config, resume_at=5)
    second.restore(choose_checkpoint(tmp_path / "parts/checkpoints"))
    second.train()
    assert branch(second).seen == list(range(5, config.training.steps))
    assert same(weights(whole.learner.model), weights(second.learner.model))
    assert Run.open(tmp_path / "parts").load_model("latest").stack.blocks[1].attention_residual.share == 1.0  # type: ignore[union-attr]


def test_a_checkpoint_from_before_learners_knew_their_step_goes_on(text: Any, tmp_path: Path) -> None:
    whole = trainer_for(tmp_path / "whole", text, TINY)
    whole.train()
    trainer_for(tmp_path / "parts", text, TINY).train(until=6)
    older = choose_checkpoint(tmp_path / "parts/checkpoints")
    state = load_trainer_state(older)
    model = Run.open(tmp_path / "parts").load_model("latest")
    write_checkpoint(tmp_path / "parts/checkpoints", 6, model, {k: v for k, v in state.items() if k != "step"}, TINY)
    second = trainer_for(tmp_path / "parts", text, TINY, resume_at=6)
    second.restore(older)
    second.train()
    assert same(weights(whole.learner.model), weights(second.learner.model))
