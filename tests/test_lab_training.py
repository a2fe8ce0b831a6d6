"""Training inside experiments, and the experiments that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitransformer.lab.training import train
from tests.runs_for_tests import TINY, configured, prepared_text, trainer_for


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return prepared_text(tmp_path_factory.mktemp("text"))


class Steps:
    """A log that keeps what the trainer records of each step."""

    def __init__(self):
        self.losses, self.grad_norms = [], []

    def record(self, numbers):
        if "loss" in numbers:
            self.losses.append(numbers["loss"])
            self.grad_norms.append(numbers["grad_norm"])

    def line(self, text):
        pass

    advance = close = line


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": "admin", "dropout": 0.1, "seed": 3},
        {"optimizer": "muon", "grad_accumulation": 2, "grad_clip": 0.0, "schedule": "inverse-sqrt"},
        {"num_experts": 3, "eps": 1e-9, "embedding_lr": 1e-3, "probe": ("update-ratio", "stream-variance")},
    ],
)
def test_experiments_train_bit_for_bit_as_the_trainer_does(text, tmp_path: Path, changes):
    config = configured(TINY, **changes)
    trainer = trainer_for(tmp_path / "run", text, config)
    trainer.log = log = Steps()
    trainer.train()
    trained = train(config, text)
    assert trained.course.losses == log.losses
    assert trained.course.grad_norms == log.grad_norms
    for ours, theirs in zip(trained.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trained.validation_loss() == trainer.validation.loss
