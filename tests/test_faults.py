"""A run survives kills, disks that fail, and damaged files: nothing is lost, nothing differs silently, no traceback.

Each test trains a run that is disturbed and compares it, bit for bit, with one that was not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minitransformer.reliability.faults import can_mount, files_in, flip_bit, small_disk
from minitransformer.reliability.injection import BALLAST
from minitransformer.reliability.launcher import KILLED, Commands, Strike
from tests.forked_for_tests import forked_commands
from tests.runs_for_tests import SMALL, TEXT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

STEPS = ("--steps", "8", "--save-every", "2", "--eval-every", "4", "--log-every", "1", "--dropout", "0.1")
BEGIN = ("--data", "my.txt", "--out", "run", *STEPS, "--keep-last", "1", *SMALL)
RESUME = ("--resume", "run")


@pytest.fixture(scope="module")
def command() -> Commands:
    return forked_commands()


def folder_with_text(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "my.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, command: Commands) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = folder_with_text(tmp_path_factory.mktemp("whole") / "here")
    ended = command(folder, "train", *BEGIN)
    assert ended.code == 0, ended.output
    return folder


def weights(folder: Path, checkpoint: str = "latest") -> dict[str, bytes]:
    stored = load_file(folder / "run/checkpoints" / checkpoint / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in stored.items()}


def rows(folder: Path) -> list[dict[str, object]]:
    """The records of the run, without what depends on time."""
    kept = ("step", "loss", "grad_norm", "skipped_steps", "lr", "tokens", "validation_loss", "bits_per_byte")
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name in kept} for line in lines]


def assert_same(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    assert weights(folder, "best") == weights(whole, "best")
    assert rows(folder) == rows(whole)
    assert (folder / "run/samples.txt").read_text().endswith((whole / "run/samples.txt").read_text())
    assert not [path for ending in ("partial", "replaced") for path in (folder / "run").rglob(f"*.{ending}")]


def finish(command: Commands, folder: Path) -> None:
    """What the messages say to do: resume the run, or begin it where it says that there is none."""
    ended = command(folder, "train", *RESUME)
    if ended.code == 2 and "is not a run folder" in ended.output:
        ended = command(folder, "train", *BEGIN)
    assert ended.code == 0 or "has done its 8 steps" in ended.output, ended.output


def steps_saved(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "run/checkpoints").glob("step-??????")), default=0)


# --- 100 kills


def test_a_run_that_is_killed_at_any_change_of_the_disk_ends_as_if_it_had_not_been(
    command: Commands, whole: Path, tmp_path: Path
) -> None:
    calls = command(folder_with_text(tmp_path / "counted"), "train", *BEGIN).calls[0]
    assert calls > 60
    for number in range(1, calls + 1, max(1, calls // 20)):
        folder = folder_with_text(tmp_path / str(number))
        assert command(folder, "train", *BEGIN, strike=Strike(at=number)).code == KILLED
        finish(command, folder)
        assert_same(folder, whole)


def test_a_checkpoint_that_is_written_again_survives_a_kill_at_any_change(
    command: Commands, whole: Path, tmp_path: Path
) -> None:
    """Of a run that was stopped in its last validation, which has no other checkpoint of its last step."""
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped, symlinks=True)
    (stopped / "run/samples.txt").unlink()
    _forget_the_last_validation(stopped / "run")
    counted = tmp_path / "counted"
    shutil.copytree(stopped, counted, symlinks=True)
    calls = command(counted, "train", *RESUME).calls[0]
    assert_same(counted, whole)
    for number in range(1, calls + 1):
        folder = tmp_path / str(number)
        shutil.copytree(stopped, folder, symlinks=True)
        assert command(folder, "train", *RESUME, strike=Strike(at=number)).code == KILLED
        finish(command, folder)
        assert_same(folder, whole)


def _forget_the_last_validation(run: Path) -> None:
    """Make the run what Ctrl-C in its last validation leaves."""
    import torch

    from minitransformer import files

    checkpoint = run / "checkpoints/step-000008"
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    earlier = [json.loads(line) for line in lines[:-1] if "validation_loss" in line]
    state["progress"].update(
        validated_step=4, best_step=4, best_loss=earlier[-1]["validation_loss"], validations_since_best=0
    )
    torch.save(state, checkpoint / "trainer.pt")
    manifest = files.unsealed(json.loads((checkpoint / "manifest.json").read_text()))
    manifest["sha256"]["trainer.pt"] = files.sha256(checkpoint / "trainer.pt")
    (checkpoint / "manifest.json").write_text(json.dumps(files.sealed(manifest)))
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    (run / "checkpoints/best").unlink()


def test_a_run_that_is_killed_again_and_again_at_random_ends_as_if_it_had_not_been(
    command: Commands, whole: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    folder = folder_with_text(tmp_path / "here")
    killed, saved = 0, 0
    for _ in range(30):
        began = (folder / "run/config.json").exists()
        ended = command(folder, "train", *(RESUME if began else BEGIN), strike=Strike(after=draw.uniform(0.0, 0.5)))
        assert ended.code == KILLED or "has done its 8 steps" in ended.output or ended.code == 0, ended.output
        killed += ended.code == KILLED
        assert steps_saved(folder) >= saved
        saved = steps_saved(folder)
        if ended.code != KILLED:
            assert_same(folder, whole)
            shutil.rmtree(folder / "run")
            saved = 0
    assert killed >= 5


# --- 20 disks


@contextmanager
def disk(path: Path, options: str) -> Iterator[Path]:
    """A small disk of its own."""
    if not can_mount():
        pytest.skip("mounting is not allowed here")
    with small_disk(path, options):
        yield path


def put_text_and_tokens(folder: Path, whole: Path) -> None:
    """Links, so that the disk is for the run alone."""
    (folder / "my.txt").symlink_to(whole / "my.txt")
    (folder / "work").symlink_to(whole / "work")


@pytest.mark.parametrize("number", range(1, 78, 7))
def test_a_disk_that_fills_up_at_any_time_is_one_sentence_and_keeps_what_it_has(
    command: Commands, whole: Path, tmp_path: Path, number: int
) -> None:
    with disk(tmp_path / "here", "size=12m") as folder:
        put_text_and_tokens(folder, whole)
        ended = command(folder, "train", *BEGIN, strike=Strike(at=number, fault="fill"))
        assert ended.in_one_sentence, ended.output
        assert ended.code == 1
        (folder / BALLAST).unlink()
        finish(command, folder)
        assert_same(folder, whole)


@pytest.mark.parametrize("inodes", [5, 8, 12, 16, 24])
def test_a_disk_without_inodes_is_one_sentence_and_keeps_what_it_has(
    command: Commands, whole: Path, tmp_path: Path, inodes: int
) -> None:
    with disk(tmp_path / "here", f"size=20m,nr_inodes={inodes}") as folder:
        put_text_and_tokens(folder, whole)
        ended = command(folder, "train", *BEGIN)
        assert ended.in_one_sentence, ended.output
        assert ended.code == 1
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(folder)], check=True)
        finish(command, folder)
        assert_same(folder, whole)


@pytest.mark.parametrize("arguments", [BEGIN, (*RESUME, "--steps", "9")])
def test_a_disk_that_may_not_be_written_is_one_sentence_and_can_be_read(
    command: Commands, whole: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with disk(tmp_path / "here", "size=20m") as folder:
        put_text_and_tokens(folder, whole)
        if arguments is not BEGIN:
            shutil.copytree(whole / "run", folder / "run", symlinks=True)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        ended = command(folder, "train", *arguments)
        assert ended.in_one_sentence, ended.output
        assert ended.code == 1
        assert "cannot be written" in ended.output
        if arguments is not BEGIN:
            assert command(folder, "sample", "run", "--prompt", "Line", "--max-new-tokens", "3").code == 0
            assert_same(folder, whole)


@pytest.mark.parametrize("number", range(19, 98, 17))
def test_a_folder_that_vanishes_at_any_time_is_one_sentence(
    command: Commands, whole: Path, tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    put_text_and_tokens(folder, whole)
    ended = command(folder, "train", *BEGIN, strike=Strike(at=number, fault="vanish"))
    assert ended.in_one_sentence, ended.output
    assert ended.code == 1
    if (folder / "run").exists():
        shutil.rmtree(folder / "run")
    assert command(folder, "train", *BEGIN).code == 0
    assert_same(folder, whole)


# --- 100 corruptions


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_byte_is_noticed_or_makes_no_difference(
    command: Commands, whole: Path, tmp_path: Path, seed: int
) -> None:
    """In any file of a run or of its prepared text: what comes of it is one sentence, or the same bits."""
    longer = (*RESUME, "--steps", "10")
    reference = tmp_path / "reference"
    shutil.copytree(whole, reference, symlinks=True)
    assert command(reference, "train", *longer).code == 0
    draw = random.Random(seed)
    refused = 0
    for number in range(50):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder, symlinks=True)
        damaged = draw.choice(files_in(folder / "run", folder / "work"))
        for _ in range(draw.choice([1, 1, 1, 5])):
            flip_bit(damaged, draw.randrange(damaged.stat().st_size), draw.randrange(8))
        ended = command(folder, "train", *longer)
        where = f"{damaged.relative_to(folder.resolve())}: {ended.output}"
        if ended.code != 0:
            assert ended.in_one_sentence, where
            refused += 1
            continue
        assert weights(folder) == weights(reference), where
        assert weights(folder, "best") == weights(reference, "best"), where
        assert damaged.name == "metrics.jsonl" or rows(folder) == rows(reference), where
        shutil.rmtree(folder)
    assert 5 < refused < 50
