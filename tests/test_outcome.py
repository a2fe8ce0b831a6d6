"""What is said at the end of training, and whose weights speak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitransformer.commands.train import main
from minitransformer.training import validation
from minitransformer.training.loop import Progress
from minitransformer.training.outcome import describe
from minitransformer.training.validation import Validation
from tests.runs_for_tests import TEXT, configured, prepared_text, trainer_for, validation_of

pytestmark = pytest.mark.unchecked_shapes

RISING = (3.0, 2.0, 2.5, 2.6)


def described(path: Path, losses: dict[int, float], last: Validation, **progress: float) -> str:
    metrics = path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()))
    return "\n".join(describe(last, Progress(**progress), metrics, window=2))


def test_where_the_last_validation_is_the_best_there_is_one_line(tmp_path):
    said = described(tmp_path, {2: 1.0}, validation_of(1.5), step=8, best_step=8, best_loss=1.5)
    assert said == "validation loss 1.5000, perplexity 4.48 (best at step 8)"


def test_the_last_and_the_best_loss_stand_there_each_with_its_step(tmp_path):
    said = described(tmp_path, {4: 2.0, 8: 2.5}, validation_of(2.6), step=8, best_step=4, best_loss=2.0)
    assert said.splitlines() == [
        "validation loss 2.6000, perplexity 13.46 (last, at step 8)",
        "best       loss 2.0000 (at step 4); the sample is of its weights",
    ]


@pytest.mark.parametrize(
    ("losses", "last", "parted"),
    [
        ({3: 2.0, 4: 1.8, 7: 1.0, 8: 0.8}, 2.6, True),
        ({3: 2.0, 4: 1.8, 7: 1.0, 8: 0.8}, 2.005, False),  # hardly above the best
        ({3: 1.0, 4: 1.0, 7: 1.5, 8: 1.5}, 2.6, False),  # training got worse as well
        ({3: None, 4: None, 8: 0.8}, 2.6, False),  # not known
    ],
)
def test_it_is_said_when_validation_has_parted_from_training(tmp_path, losses, last, parted):
    said = described(tmp_path, losses, validation_of(last), step=8, best_step=4, best_loss=2.0)
    assert (
        "since step 4 the training loss fell from 1.9000 to 0.9000, and validation rose by 0.6000" in said
    ) == parted


def test_a_best_loss_of_a_part_is_beside_the_last_one_of_that_part(tmp_path):
    last = validation_of(2.6, subset_loss=2.4)
    said = described(tmp_path, {4: 2.0, 8: 1.0}, last, step=8, best_step=4, best_loss=2.0)
    assert "loss 2.6000" in said
    assert (
        "best       loss 2.0000 (at step 4); the sample is of its weights; on the same tokens, the last has 2.4000"
        in said
    )
    assert "rose by 0.4000" in said


def test_the_sample_at_the_end_is_of_the_best_weights(tmp_path):
    trainer = trainer_for(tmp_path / "run", prepared_text(tmp_path), configured(steps=8, eval_every=2))
    losses = iter(RISING)
    trainer._validate = lambda: trainer._note(validation_of(next(losses)))
    trainer.train()
    seen = []
    trainer.sample = lambda model, loader: seen.append(model) or "words"
    said = trainer.write_sample(best=True)
    best = load_file(tmp_path / "run/checkpoints/best/model.safetensors")
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step-000004"
    assert torch.equal(seen[0].embedding.table.weight, best["embedding.table.weight"])
    assert not torch.equal(trainer.learner.model.embedding.table.weight, best["embedding.table.weight"])
    assert said == "from the best weights, of step 4:\nwords"
    assert (tmp_path / "run/samples.txt").read_text() == f"--- step 8\n{said}\n"


@pytest.mark.parametrize("sample_at_eval", [True, False])
def test_an_early_stop_reports_and_samples_the_best(tmp_path, monkeypatch, capsys, sample_at_eval):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    (tmp_path / "my.txt").write_text(TEXT)
    losses = iter(RISING)
    monkeypatch.setattr(validation, "validate", lambda *_, **__: validation_of(next(losses), tokens=9))
    shape = ["--d-model", "16", "--num-layers", "1", "--num-heads", "2", "--context-length", "16", "--batch-size", "2"]
    options = ["--tokenizer", "bytes", "--precision", "fp32", "--compile", "off", "--warmup-steps", "0"]
    options += ["--steps", "100", "--eval-every", "5", "--patience", "2", "--log-every", "1"]
    options += ["--sample-at-eval"] if sample_at_eval else []
    assert main(["--data", "my.txt", "--out", "run", *shape, *options]) == 0
    out = capsys.readouterr().out
    assert "from the best weights, of step 10:" in out
    assert "validation loss 2.6000, perplexity 13.46 (last, at step 20)" in out
    assert "best       loss 2.0000 (at step 10); the sample is of its weights" in out
    assert "parted     since step 10 the training loss fell" in out
    assert "curves     python -m minitransformer compare run" in out
