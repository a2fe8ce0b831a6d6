"""Runs that nobody else disturbs, that can always go on, and that notice when a file is not what was written."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
from minitransformer.training.loop import Trainer
from tests.runs_for_tests import TEXT, configured, prepared_text
from tests.test_train_command import SMALL, refused, train

END = ("--steps", "6", "--save-every", "2")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    assert train("--out", "run", "--save-every", "2") == 0
    capsys.readouterr()
    return here / "run"


def weights(run, checkpoint="latest"):
    return load_file(run / "checkpoints" / checkpoint / "model.safetensors")


def assert_same_weights(left, right):
    assert all(torch.equal(left[name], right[name]) for name in {*left, *right})


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record.get("loss"), record.get("validation_loss")) for record in records]


# --- one writer


def test_a_second_resume_is_refused_in_one_sentence_and_changes_nothing(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with only_writer(run):
        error = refused(capsys, "--resume", "run", "--steps", "9")
    assert "another process trains run" in error
    assert f"pid {os.getpid()}" in error
    assert before.keys() <= set(run.rglob("*"))
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "train.lock")


def test_of_two_new_runs_with_one_name_one_is_refused(here, capsys):
    with only_writer(here / "run"):
        assert "another process trains run" in refused(capsys, "--data", "my.txt", "--out", "run", *SMALL)
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


# --- whole or as before


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
    synced, steps, fsync = [], [], os.fsync

    def noted(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        if synced[-1].name == "metrics.jsonl":
            steps.append([step for step, *_ in losses(here / "run")][-1])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    assert train("--out", "run", "--save-every", "3", "--log-every", "1") == 0
    assert steps == [3, 6]
    assert {here, here / "run", here / "run/train.log", here / "run/checkpoints"} <= set(synced)
    monkeypatch.undo()
    synced.clear()
    monkeypatch.setattr(os, "fsync", noted)
    files.point_to(here / "link", "run")
    assert synced == [here]


# --- disks


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


# --- no dead ends


def test_a_run_without_a_checkpoint_begins_at_its_first_step(here, run, capsys):
    whole = weights(run), losses(run)
    for path in (run / "checkpoints").iterdir():
        files.remove(path)
    assert main(["--resume", "run"]) == 0
    assert "starts at step 0" in capsys.readouterr().out
    assert losses(run) == whole[1]
    assert_same_weights(weights(run), whole[0])


@pytest.mark.parametrize("left", [[], ["checkpoints"], ["checkpoints", "tokenizer.json", ".config.json-1.partial"]])
def test_a_folder_that_never_became_a_run_can_be_begun_again(here, run, left):
    for name in left:
        path = here / "half" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "checkpoints" else path.write_text("{")
    (here / "half").mkdir(exist_ok=True)
    assert train("--out", "half") == 0
    assert_same_weights(weights(here / "half"), weights(run))
    assert not list((here / "half").glob("*.partial"))


def test_a_trained_run_that_lost_its_configuration_is_not_begun_again(run, capsys):
    (run / "config.json").unlink()
    before = sorted(run.rglob("*"))
    assert "already exists" in refused(capsys, "--data", "my.txt", "--out", "run", *SMALL)
    assert sorted(run.rglob("*")) == before


def stop_in_the_last_validation(monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("minitransformer.training.validation.validate", interrupted)


def test_a_run_that_was_stopped_in_its_last_validation_does_what_is_missing(here, run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_the_last_validation(patch)
        assert train("--out", "stopped", "--save-every", "2") == 130
    stopped = here / "stopped"
    assert not (stopped / "samples.txt").exists()
    assert main(["--resume", "stopped"]) == 0
    assert losses(stopped) == losses(run)
    assert (stopped / "samples.txt").read_text() == (run / "samples.txt").read_text()
    assert_same_weights(weights(stopped, "best"), weights(run, "best"))
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
    assert_same_weights(weights(here / "tuned"), weights(here / "whole"))


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


# --- what is not what was written


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": 1'),
        ('"dropout": 0.0', '"dropout": 0.1'),
        ('"num_heads": 2', '"num_heads": 4'),
        ('"beta2": 0.95', '"beta2": 0.99'),
        ('"text": "', '"text": "0'),
    ],
)
@pytest.mark.parametrize("command", ["resume", "sample"])
def test_a_changed_digit_in_the_configuration_is_noticed(run, capsys, old, new, command):
    content = (run / "config.json").read_text()
    (run / "config.json").write_text(content.replace(old, new, 1))
    assert content != (run / "config.json").read_text()
    code = main(["--resume", "run", "--steps", "9"]) if command == "resume" else sample(["run", "--prompt", "Line"])
    error = capsys.readouterr().err
    assert code == 1
    assert error.startswith("error: run/config.json was changed after training")
    assert error.count("\n") == 1


def test_a_resumed_run_writes_down_its_configuration_anew(run, capsys):
    assert main(["--resume", "run", "--steps", "9", "--lr", "0.002"]) == 0
    assert main(["--resume", "run", "--steps", "12"]) == 0
    assert Run.open(run).config.training.lr == 0.002


def test_a_whole_configuration_of_another_run_does_not_fit_the_checkpoints(here, run, capsys):
    assert train("--out", "other", "--seed", "1") == 0
    shutil.copy(here / "other/config.json", run / "config.json")
    error = refused(capsys, "--resume", "run", "--steps", "9", code=1)
    assert "trained with seed 0" in error
    assert "config.json says 1" in error


def test_the_tokenizer_of_another_run_is_noticed(here, run, capsys):
    assert main(["--data", "my.txt", "--out", "other", "--steps", "1", *SMALL, "--tokenizer", "chars"]) == 0
    shutil.copy(here / "other/tokenizer.json", run / "tokenizer.json")
    assert "tokenizer.json was changed after training" in refused(capsys, "--resume", "run", "--steps", "9", code=1)


def test_a_run_from_before_there_were_checksums_opens_and_goes_on(here, run):
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({k: v for k, v in record.items() if k not in ("checksum", "sha256")}))
    for manifest in run.glob("checkpoints/step-*/manifest.json"):
        record = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({"step": record["step"], "sha256": record["sha256"]}))
    for sums in (here / "work/prepared").glob("*/sha256.json"):
        sums.unlink()
    assert sample(["run", "--prompt", "Line", "--max-new-tokens", "3"]) == 0
    assert main(["--resume", "run", "--steps", "9"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": {}}, "no checksum of model.safetensors"),
        ({"step": 5}, "that of step 5"),
        ({"checksum": "0"}, "missing or damaged"),
    ],
)
def test_a_manifest_that_is_not_that_of_its_checkpoint_is_damage(run, change, words):
    checkpoint = run / "checkpoints/step-000006"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    if "checksum" not in change:
        del manifest["checksum"]
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert words in damage(checkpoint)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json", "tokenizer.json", "sha256.json"])
def test_prepared_text_of_which_a_byte_has_changed_is_made_again(tmp_path, name):
    prepared = prepared_text(tmp_path)
    path = prepared.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    again = prepared_text(tmp_path)
    assert again.folder == prepared.folder
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["scan", "tokenizer"])
def test_notes_about_a_text_of_which_a_digit_has_changed_are_taken_again(here, run, name):
    [note] = (here / "work/prepared").glob(f"{name}-*.json")
    content = note.read_bytes()
    digit = next(i for i, byte in enumerate(content) if chr(byte).isdigit())
    note.write_bytes(content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :])
    assert train("--out", "again") == 0
    assert note.read_bytes() == content
    assert_same_weights(weights(here / "again"), weights(run))


def test_hashes_of_a_large_file_take_every_core_and_see_every_byte(tmp_path, monkeypatch):
    from minitransformer.text import caching

    monkeypatch.setattr(caching, "BLOCK", 7)
    path = tmp_path / "tokens"
    content = bytes(range(50))
    seen = set()
    for place in range(len(content)):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        seen.add(caching.digest_of(path))
    assert len(seen) == len(content)
    path.write_bytes(content)
    assert caching.digest_of(path) == caching.digest_of(path)
