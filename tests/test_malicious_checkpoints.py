"""Checkpoints made to do harm execute nothing, and are refused in one sentence, in seconds and without much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitransformer.errors import StorageError, UserError
from minitransformer.models import model as models
from minitransformer.models.config import ModelConfig
from minitransformer.training.checkpoint import load_trainer_state
from minitransformer.training.progress import Progress
from tests.malicious_for_tests import attacks
from tests.runs_for_tests import learner_for

SECONDS = 10


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, bool]]:
    """What came of each attack in a process that may take 512 MB more than it has after its imports."""
    command = [sys.executable, "-m", "tests.malicious_for_tests", str(tmp_path_factory.mktemp("attacks"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: tuple(outcome) for name, outcome in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", attacks())
def test_it_is_refused_and_executes_nothing(outcomes: dict[str, tuple[str, float, bool]], name: str) -> None:
    came, seconds, executed = outcomes[name]
    assert not executed
    assert came.startswith("refused: "), came
    assert "\n" not in came
    assert "\x1b" not in came
    assert "weights_only" not in came, "which is how to execute it"
    assert seconds < SECONDS


def test_a_zip_bomb_is_refused_before_it_is_unpacked(outcomes: dict[str, tuple[str, float, bool]]) -> None:
    bombs = [came for name, (came, *_) in outcomes.items() if "bomb" in name]
    assert len(bombs) == 2
    assert all("compressed" in came for came in bombs)


def test_a_model_that_is_larger_than_the_memory_is_refused() -> None:
    config = ModelConfig(d_model=1 << 15, num_layers=100, num_heads=64, vocab_size=1 << 20)
    with pytest.raises(UserError, match=r"weights, which take [\d.]+ TB, and this machine has .* of memory"):
        models.check_memory(config, "it")


@pytest.mark.parametrize(
    "progress", [None, [], {"step": "5"}, {"step": 5, "other": 1}, {"step": float("nan")}, {"best_loss": []}]
)
def test_a_progress_of_another_kind_is_refused(progress: object) -> None:
    with pytest.raises(StorageError, match=r"progress|which must be"):
        Progress.from_json(progress, "it")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizers": None},
        {"optimizers": [5]},
        {"optimizers": []},
        {"optimizers": [{"state": []}]},
        {"optimizers": [{"state": {0: {"exp_avg": torch.zeros(1).expand(1 << 40)}}}]},
        {"optimizers": [{"state": {"nothing": {}}}]},
        {"precision": 7, "step": None, "optimizers": {}},
    ],
)
def test_the_state_of_another_learner_is_refused(text: object, change: dict[str, object]) -> None:
    learner = learner_for(text)  # type: ignore[arg-type]
    with pytest.raises(StorageError):
        learner.load_state_dict({**learner.state_dict(), **change})


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    state = {"optimizers": [{"a": torch.ones(3)}], "precision": {}, "progress": {"step": 5}}
    torch.save(state, tmp_path / "trainer.pt")
    assert load_trainer_state(tmp_path)["progress"] == {"step": 5}
