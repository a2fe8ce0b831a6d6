"""One process writes a run, and what it writes is on disk whole or not at all."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from minitransformer import files
from minitransformer.analysis.trials import train_trial
from minitransformer.commands.compare import main as compare
from minitransformer.commands.sample import main as sample
from minitransformer.commands.train import main
from minitransformer.errors import StorageError, UserError
from minitransformer.models.model import build_model
from minitransformer.pretrained.shards import write_shards
from minitransformer.runs import Run, only_writer
from minitransformer.training.checkpoint import choose_checkpoint, damage, write_checkpoint
from tests.runs_for_tests import SMALL, configured, metrics, refused, train

END = ("--steps", "6", "--save-every", "2")


def test_a_second_resume_is_refused_in_one_sentence_and_changes_nothing(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with only_writer(run):
        error = refused(capsys, "--resume", "run", "--steps", "9")
    assert "another process is training run" in error
    assert f"pid {os.getpid()}" in error
    assert before.keys() <= set(run.rglob("*"))
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "train.lock")


def test_of_two_new_runs_with_one_name_one_is_refused(here, capsys):
    with only_writer(here / "run"):
        assert "another process is training run" in refused(capsys, "--data", "my.txt", "--out", "run", *SMALL)
    assert [path.name for path in (here / "run").iterdir()] == ["train.lock"]


def test_a_trial_that_another_process_trains_is_refused(here):
    config = configured(data="my.txt")
    with only_writer(here / "trial"), pytest.raises(UserError, match=r"another process is training .*trial"):
        train_trial(here / "trial", config, until=6)


def test_a_run_is_read_while_it_is_trained(run, capsys):
    with only_writer(run):
        assert sample(["run", "--prompt", "Line", "--max-new-tokens", "3"]) == 0
        assert compare(["run"]) == 0


def test_leftovers_are_cleared_by_who_holds_the_lock_alone(run, capsys):
    left = run / "checkpoints/step-000008-cut.partial"
    left.mkdir()
    with only_writer(run):
        assert not left.exists()
        left.mkdir()
        refused(capsys, "--resume", "run", "--steps", "9")
        assert left.exists()


def version(folder):
    return (folder / "content").read_text() if (folder / "content").exists() else None


def test_while_a_folder_is_replaced_one_version_of_it_is_on_disk(tmp_path, monkeypatch):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "content").write_text("old")
    seen = []

    def watched(function):
        def called(*arguments, **named):
            result = function(*arguments, **named)
            seen.append((version(target), version(tmp_path / "folder.replaced")))
            return result

        return called

    for name in ("rename", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    with files.whole_folder(target) as partial:
        (partial / "content").write_text("new")
    assert (None, "old") in seen
    assert all("new" in versions or "old" in versions for versions in seen)
    assert version(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_checkpoint_that_a_kill_left_set_aside_is_found_again(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "step-000006").rename(checkpoints / "step-000006.replaced")
    assert Run.open(run).checkpoint("latest").name == "step-000006"
    shutil.copytree(checkpoints / "step-000006", checkpoints / "step-000006.replaced")
    assert Run.open(run).checkpoint("latest").name == "step-000006"
    assert not (checkpoints / "step-000006.replaced").exists()


def test_what_is_set_aside_while_another_process_trains_is_left_to_it(run):
    checkpoints = run / "checkpoints"
    with only_writer(run):
        (checkpoints / "step-000006").rename(checkpoints / "step-000006.replaced")
        assert Run.open(run).checkpoint("step-000004").name == "step-000004"
        assert (checkpoints / "step-000006.replaced").exists()


def test_a_checkpoint_is_on_disk_with_all_that_it_stands_for(here, monkeypatch):
    """The records before the checkpoint, and then the links to it and the folders above it."""
    synced, steps, saved, fsync, rename = [], [], {}, os.fsync, os.rename

    def noted(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        if synced[-1].name == "metrics.jsonl":
            steps.append(metrics(here / "run")[-1]["step"])
        fsync(descriptor)

    def renamed(source, target):
        saved[Path(target).name] = max(steps, default=0)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    assert train("--out", "run", "--save-every", "3", "--log-every", "1") == 0
    # Training goes on while a checkpoint is written, so that there may be later records.
    assert len(steps) == 2
    assert saved["step-000003"] >= 3
    assert saved["step-000006"] == 6
    assert {here, here / "run", here / "run/train.log", here / "run/checkpoints"} <= set(synced)
    monkeypatch.undo()
    synced.clear()
    monkeypatch.setattr(os, "fsync", noted)
    files.point_to(here / "link", "run")
    assert synced == [here]


def test_a_disk_that_fills_up_is_noticed_before_a_checkpoint_is_begun(here, capsys, monkeypatch):
    whole = shutil.disk_usage
    saved = here / "run/checkpoints/step-000002"

    def filling(path):
        return type("Usage", (), {"free": 1000}) if saved.exists() else whole(path)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    error = refused(capsys, "--data", "my.txt", "--out", "run", *END, *SMALL, code=1)
    for word in ("step-000004", "kB free", "--resume run", "step-000002 is the last one"):
        assert word in error
    assert damage(choose_checkpoint(here / "run/checkpoints")) is None
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(["--resume", "run"]) == 0


def test_where_not_even_the_first_checkpoint_fits_nothing_is_said_of_going_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match=r"free some, or choose an --out on another disk$"):
        write_checkpoint(tmp_path, 0, build_model(configured().model), {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
@pytest.mark.parametrize("kind", ["model", "trainer", "export"])
def test_a_write_that_fails_half_way_is_an_answer_of_the_disk(tmp_path, kind):
    """Neither safetensors nor torch raises an OSError by itself."""
    import resource

    (tmp_path / "checkpoints").mkdir()
    model = build_model(configured().model)
    state = {"large": torch.zeros(100_000)} if kind == "trainer" else {}

    def write():
        if kind != "export":
            write_checkpoint(tmp_path / "checkpoints", 1, model, state)
        with files.whole_folder(tmp_path / "checkpoints/copy") as folder:
            write_shards({"large": torch.zeros(100_000)}, folder)

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if kind == "trainer" else 5_000, limit[1]))
        with pytest.raises(StorageError, match="no space left"), files.writing(tmp_path, "choose another"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "ENOENT", "ENOTDIR"])
def test_every_answer_of_a_disk_is_a_sentence(tmp_path, number):
    number = getattr(errno, number)
    with pytest.raises(StorageError, match="choose another"), files.writing(tmp_path, "choose another"):
        raise OSError(number, os.strerror(number))


def test_a_reader_that_has_left_is_no_answer_of_a_disk(tmp_path):
    with pytest.raises(BrokenPipeError), files.writing(tmp_path, "choose another"):
        raise BrokenPipeError(32, "Broken pipe")
