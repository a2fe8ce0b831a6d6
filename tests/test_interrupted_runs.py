"""However a run was interrupted, it can go on: there are no dead ends."""

import errno
import shutil
import signal

import pytest

from minitransformer import files
from minitransformer.commands.train import main
from minitransformer.training.loop import Trainer
from tests.runs_for_tests import SMALL, assert_same_weights, metrics, refused, saved_weights, train


def test_a_run_without_a_checkpoint_begins_at_its_first_step(here, run, capsys):
    whole = saved_weights(run), metrics(run)
    for path in (run / "checkpoints").iterdir():
        files.remove(path)
    assert main(["--resume", "run"]) == 0
    assert "starts at step 0" in capsys.readouterr().out
    assert metrics(run) == whole[1]
    assert_same_weights(saved_weights(run), whole[0])


@pytest.mark.parametrize("left", [[], ["checkpoints"], ["checkpoints", "tokenizer.json", ".config.json-1.partial"]])
def test_a_folder_that_never_became_a_run_can_be_begun_again(here, run, left):
    for name in left:
        path = here / "half" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "checkpoints" else path.write_text("{")
    (here / "half").mkdir(exist_ok=True)
    assert train("--out", "half") == 0
    assert_same_weights(saved_weights(here / "half"), saved_weights(run))
    assert not list((here / "half").glob("*.partial"))


def test_a_trained_run_that_lost_its_configuration_is_not_begun_again(run, capsys):
    (run / "config.json").unlink()
    before = sorted(run.rglob("*"))
    assert "already exists" in refused(capsys, "--data", "my.txt", "--out", "run", *SMALL)
    assert sorted(run.rglob("*")) == before


def stop_in_the_last_validation(monkeypatch):
    def interrupted(*_, advance, **__):
        signal.raise_signal(signal.SIGINT)
        advance(0, 1)

    monkeypatch.setattr("minitransformer.training.validation.validate", interrupted)


def test_a_run_that_was_stopped_in_its_last_validation_does_what_is_missing(here, run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_the_last_validation(patch)
        assert train("--out", "stopped", "--save-every", "2") == 130
    stopped = here / "stopped"
    assert not (stopped / "samples.txt").exists()
    assert main(["--resume", "stopped"]) == 0
    assert metrics(stopped) == metrics(run)
    assert (stopped / "samples.txt").read_text() == (run / "samples.txt").read_text()
    assert_same_weights(saved_weights(stopped, "best"), saved_weights(run, "best"))
    assert "6 steps" in refused(capsys, "--resume", "stopped")


def test_a_run_that_ended_before_its_sample_writes_it(run):
    sampled = (run / "samples.txt").read_text()
    (run / "samples.txt").unlink()
    assert main(["--resume", "run"]) == 0
    assert (run / "samples.txt").read_text() == sampled


def test_a_signal_in_the_last_sample_finds_a_run_that_is_complete(here, capsys, monkeypatch):
    write = Trainer.write_sample

    def interrupted(self, **choices):
        signal.raise_signal(signal.SIGTERM)
        return write(self, **choices)

    monkeypatch.setattr(Trainer, "write_sample", interrupted)
    assert train("--out", "run") == 0
    assert "--resume" not in capsys.readouterr().out


def test_a_fine_tuned_run_begins_again_with_the_weights_of_its_parent(here, run, monkeypatch, capsys):
    assert train("--out", "whole", "--init-from", "run") == 0

    def failing(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", failing)
        assert train("--out", "tuned", "--init-from", "run") == 130
    assert [path.name for path in (here / "tuned/checkpoints").glob("step-*")] == ["step-000000"]
    assert main(["--resume", "tuned"]) == 0
    assert_same_weights(saved_weights(here / "tuned"), saved_weights(here / "whole"))


def test_a_fine_tune_that_could_not_copy_what_its_parent_kept_is_no_run_and_can_be_begun_again(
    here, run, monkeypatch, capsys
):
    (run / "original").mkdir()
    (run / "original/config.json").write_text("{}")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        error = refused(capsys, "--init-from", "run", "--data", "my.txt", "--out", "tuned", "--steps", "2", code=1)
    assert "no space left" in error
    assert not (here / "tuned/config.json").exists()
    assert train("--out", "tuned", "--init-from", "run") == 0
    assert (here / "tuned/original/config.json").exists()


def test_a_folder_of_another_kind_with_original_files_is_not_cleared(here, capsys):
    (here / "llama/original").mkdir(parents=True)
    assert "already exists" in refused(capsys, "--data", "my.txt", "--out", "llama", *SMALL)
    assert (here / "llama/original").exists()


def test_a_text_that_has_moved_is_named_anew(here, run, capsys):
    (here / "my.txt").rename(here / "moved.txt")
    assert main(["--resume", "run", "--steps", "9", "--data", "moved.txt"]) == 0
    assert "changed    data my.txt -> moved.txt" in capsys.readouterr().out


def test_a_kill_between_the_best_checkpoint_and_its_link_does_not_lose_it(run):
    (run / "checkpoints/best").unlink()
    assert main(["--resume", "run", "--steps", "7", "--lr", "1e-9"]) == 0
    assert (run / "checkpoints/best").exists()
