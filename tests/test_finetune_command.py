"""`train.py --init-from`: a run begins with the weights of another one, and says which."""

import hashlib
import json
from dataclasses import replace

import pytest

from minitransformer.commands.train import main
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.runs import Run
from minitransformer.training.finetuning import check_fits
from tests.runs_for_tests import SMALL, TEXT, assert_same_weights, refused, saved_weights, unsealed


def test_an_import_is_fine_tuned_and_not_resumed(run, capsys):
    (run / "config.json").write_text(json.dumps({**unsealed(run / "config.json"), "text": ""}))
    assert "--init-from run" in refused(capsys, "--resume", "run", "--steps", "9")


def test_a_public_checkpoint_that_cannot_be_imported_is_named(here, capsys):
    (here / "llama").mkdir()
    (here / "llama/config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "llama has neither model.safetensors nor" in refused(capsys, "--init-from", "llama")
    assert not (here / "runs").exists()


def tuned(*arguments):
    data = () if "--data" in arguments else ("--data", "my.txt")
    return main(["--init-from", "parent", *data, "--device", "cpu", "--compile", "off", *arguments])


@pytest.fixture
def parent(here, capsys):
    """A run of Muon whose rates, context and steps are those of training from scratch."""
    assert main(["gpt-nano", "--out", "parent", "--data", "my.txt", "--steps", "3", *SMALL]) == 0
    record = unsealed(here / "parent/config.json")
    record["model"]["context_length"] = 4096
    record["training"] |= {"steps": 100_000, "warmup_steps": 700}
    (here / "parent/config.json").write_text(json.dumps(record))
    manifest = here / "parent/checkpoints/step-000003/manifest.json"
    manifest.write_text(json.dumps({name: value for name, value in unsealed(manifest).items() if name != "config"}))
    capsys.readouterr()
    return here / "parent"


@pytest.mark.unchecked_shapes
def test_a_fine_tune_names_its_parent_and_not_a_preset(here, parent, capsys):
    assert tuned("--steps", "2") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "from       parent (decoder of 11.4k parameters, step-000003)"
    record = json.loads((here / "runs/parent-my/config.json").read_text())
    digest = hashlib.sha256((parent / "checkpoints/step-000003/model.safetensors").read_bytes()).hexdigest()
    assert record["parent"] == {"path": "parent", "checkpoint": "step-000003", "sha256": digest}
    assert main(["--resume", "runs/parent-my", "--steps", "3"]) == 0
    assert json.loads((here / "runs/parent-my/config.json").read_text())["parent"] == record["parent"]


@pytest.mark.unchecked_shapes
def test_a_fine_tune_learns_gently_and_its_own_children_as_gently(here, parent):
    assert tuned("--steps", "2") == 0
    old, new = Run.open(parent).config, Run.open(here / "runs/parent-my").config
    assert new.training.lr == pytest.approx(old.training.lr / 10)
    assert new.training.embedding_lr == pytest.approx(old.training.embedding_lr / 10)
    assert new.training.warmup_steps == 20
    assert (new.training.optimizer, new.training.weight_decay) == (old.training.optimizer, old.training.weight_decay)
    assert main(["--init-from", "runs/parent-my", "--steps", "1", "--out", "child"]) == 0
    assert Run.open(here / "child").config.training.lr == new.training.lr


@pytest.mark.unchecked_shapes
def test_a_short_text_fine_tunes_a_model_of_a_long_context(here, parent, capsys):
    (here / "short.txt").write_text(TEXT[:900])
    assert tuned("--data", "short.txt", "--steps", "1", "--out", "tuned") == 0
    config = Run.open(here / "tuned").config
    assert "sequences  90 tokens, of a context of 4,096\n" in capsys.readouterr().out
    assert (config.model.context_length, config.training.sequence_length) == (4096, 90)
    (here / "my.txt").write_text(TEXT * 10)
    assert tuned("--steps", "1", "--out", "long") == 0
    assert Run.open(here / "long").config.training.sequence_length == 1024


@pytest.mark.unchecked_shapes
def test_what_is_not_changed_by_training_is_the_parents_bit_for_bit(here, parent):
    assert tuned("--steps", "1", "--lr", "1e-30", "--embedding-lr", "1e-30", "--out", "tuned") == 0
    assert_same_weights(saved_weights(here / "parent"), saved_weights(here / "tuned"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt-mini", "--init-from", "parent"], ["gpt-mini", "determines the model"]),
        (["--init-from", "parent", "--resume", "parent"], ["--resume", "--init-from", "one of them"]),
        (["--init-from", "parent", "--d-model", "32"], ["d_model 16", "32"]),
        (["--init-from", "parent", "--residual", "post"], ["residual pre", "post"]),
        (["--init-from", "parent", "--tokenizer", "chars"], ["determines the tokenizer"]),
        (["--init-from", "parent", "--checkpoint", "step-000009"], ["step-000009", "step-000003"]),
        (["--init-from", "parent", "--sequence-length", "5000"], ["5000", "4096"]),
        (["--init-from", "parent", "--data", "tiny.txt"], ["tiny.txt", "too short"]),
        (["--init-from", "parent", "--data", "tiny.txt", "--sequence-length", "60"], ["tiny.txt", "61"]),
    ],
)
def test_a_fine_tune_that_cannot_be_gets_one_sentence_and_leaves_nothing(here, parent, capsys, arguments, words):
    (here / "tiny.txt").write_text(TEXT[:40])
    error = refused(capsys, *arguments)
    for word in words:
        assert word in error
    assert not (here / "runs").exists()


def test_positions_that_are_learned_cannot_be_fewer(here):
    model = ModelConfig(positions="learned", vocab_size=9)
    with pytest.raises(UserError, match=r"context_length 256, not 128: give --sequence-length"):
        check_fits(model, replace(model, context_length=128))
    rotary = replace(model, positions="rotary")
    check_fits(rotary, replace(rotary, context_length=128, dropout=0.1))
