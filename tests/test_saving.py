"""Checkpoints are written beside training: from copies, one at a time, whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Event, current_thread, main_thread
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import files
from minitransformer.training import checkpoint
from minitransformer.training.checkpoint import choose_checkpoint, damage, load_trainer_state
from minitransformer.training.config import DataConfig, RunConfig, with_usual_vocabulary
from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.loop import Trainer
from minitransformer.training.presets import PRESETS
from minitransformer.training.saving import Buffers
from tests.runs_for_tests import (
    SMALL,
    assert_same_weights,
    call_after_step,
    configured,
    metrics,
    refused,
    saved_weights,
    trainer_for,
    weights_after,
)

pytestmark = pytest.mark.unchecked_shapes
SECONDS = 20
ROOT = Path(__file__).parent.parent


def before_writing(trainer: Trainer, do: Callable[[int], object]) -> None:
    """Have the thread of `trainer` call `do` with the checkpoint's step before it writes."""
    write = trainer._saver.write_state

    def written(folder: Path, step: int, *rest: Any, **named: Any) -> Path:
        do(step)
        return write(folder, step, *rest, **named)

    trainer._saver.write_state = written


def names(run: Path) -> list[str]:
    """What is in the folder of checkpoints, but for links."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink())


def test_training_goes_on_while_a_checkpoint_is_written_which_has_the_weights_of_its_step(
    text: Any, tmp_path: Path
) -> None:
    whole = trainer_for(tmp_path / "whole", text, configured())
    kept: list[Any] = []
    call_after_step(whole, 3, lambda: kept.append(weights_after(whole)))
    whole.train()
    trainer, done = trainer_for(tmp_path / "run", text, configured(keep_last=9)), Event()
    call_after_step(trainer, 5, done.set)
    before_writing(
        trainer, lambda step: step != 3 or done.wait(SECONDS) or pytest.fail("training waited for the checkpoint")
    )
    trainer.train()
    saved = saved_weights(tmp_path / "run", "step-000003")
    assert_same_weights(saved, {name: kept[0][name] for name in saved})
    assert load_trainer_state(tmp_path / "run/checkpoints/step-000003")["progress"]["step"] == 3
    assert_same_weights(weights_after(trainer), weights_after(whole))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_one_checkpoint_is_written_at_a_time_and_all_are_when_training_ends(text: Any, tmp_path: Path) -> None:
    began: list[tuple[int, list[str]]] = []

    def note(step: int) -> None:
        assert current_thread() is not main_thread()
        time.sleep(0.05)
        began.append((step, names(tmp_path / "run")))

    trainer = trainer_for(tmp_path / "run", text, configured(steps=4, save_every=1, keep_last=9))
    before_writing(trainer, note)
    trainer.train()
    saved = [f"step-{step:06d}" for step in range(1, 5)]
    assert began == [(step + 1, saved[:step]) for step in range(4)]
    assert names(tmp_path / "run") == saved


def test_what_a_disk_answers_the_thread_ends_training_at_its_next_step(text: Any, tmp_path: Path) -> None:
    failed = Event()

    def full(step: int) -> None:
        if step == 6:
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=3, eval_every=1000))
    before_writing(trainer, full)
    call_after_step(trainer, 7, lambda: failed.wait(SECONDS))
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.progress.step in (
        6,
        7,
        8,
    )  # the thread may be quick, or slow to end
    assert names(tmp_path / "run") == ["step-000003"]
    assert damage(choose_checkpoint(tmp_path / "run/checkpoints")) is None


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_the_command_says_it_in_the_same_sentence(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "write_trainer_state", failing)
    error = refused(capsys, "--data", "my.txt", "--out", "run", "--steps", "6", "--save-every", "2", *SMALL, code=1)
    assert words in error
    assert names(here / "run") == []


def test_an_interruption_waits_for_one_file_at_most_and_leaves_the_last_checkpoint_whole(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=3, eval_every=1000))
    write_tensors, writing, written = files.write_tensors, Event(), []

    def slow(path: Path, tensors: Any) -> None:
        write_tensors(path, tensors)
        if path.parent.name.startswith("step-000006"):
            writing.set()
            trainer._saver._interrupted.wait(3)

    def noted(state: Any, path: Path) -> None:
        torch.save(state, path)
        written.append(path.parent.name[:11])

    monkeypatch.setattr(files, "write_tensors", slow)
    monkeypatch.setattr(checkpoint, "write_trainer_state", noted)

    def ctrl_c() -> None:
        assert writing.wait(SECONDS)
        raise KeyboardInterrupt

    call_after_step(trainer, 7, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert written == ["step-000003"]
    assert names(tmp_path / "run") == ["step-000003"]
    assert damage(choose_checkpoint(tmp_path / "run/checkpoints")) is None


def test_an_error_of_training_completes_the_checkpoint_that_was_being_written(text: Any, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=3, eval_every=1000))
    raised = Event()

    def broken() -> None:
        raised.set()
        raise ZeroDivisionError

    call_after_step(trainer, 5, broken)
    before_writing(trainer, lambda step: raised.wait(SECONDS))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert names(tmp_path / "run") == ["step-000003"]


def test_divergence_offers_the_checkpoint_that_was_being_written(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path / "run", text, configured(steps=100, save_every=4, eval_every=1000))
    table, asked, wait = trainer.learner.model.embedding.table.weight, Event(), trainer._saver.wait
    monkeypatch.setattr(trainer._saver, "wait", lambda: (asked.set(), wait()))
    call_after_step(trainer, 7, lambda: (asked.clear(), table.data.mul_(math.nan)))
    before_writing(trainer, lambda step: asked.wait(SECONDS))
    with pytest.raises(NonFiniteTraining, match="--checkpoint step-000004"):
        trainer.train()


tensors = st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.randn(shape))
states = st.recursive(
    st.none() | st.integers() | st.text() | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)


def leaves(state: Any) -> list[Any]:
    if isinstance(state, dict | list | tuple):
        return [leaf for part in (state.values() if isinstance(state, dict) else state) for leaf in leaves(part)]
    return [state]


@given(states)
def test_copies_are_equal_share_no_memory_with_the_state_and_reuse_their_own(state: Any) -> None:
    buffers = Buffers()
    copy, wait_for_device = buffers.copy(state)
    wait_for_device()
    again, _ = buffers.copy(state)
    assert type(copy) is type(state)
    for one, copied, reused in zip(leaves(state), leaves(copy), leaves(again), strict=True):
        if not isinstance(one, torch.Tensor):
            assert one == copied
            continue
        assert torch.equal(one, copied)
        assert reused is copied
        assert one.numel() == 0 or one.data_ptr() != copied.data_ptr()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
def test_what_a_disk_answers_rank_0_is_one_sentence_of_all_ranks(here: Path) -> None:
    import resource

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--data", "my.txt", "--out", "run", "--steps", "300", "--save-every", "10", "--d-model", "64"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *flags, *SMALL[2:]],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith(("error: ", "[rank"))] == [
        "error: no space left while writing run: free some, or choose an --out on another disk"
    ]
    assert names(here / "run") == []


@pytest.mark.slow
def test_a_checkpoint_holds_training_up_for_less_than_a_step(text: Any, tmp_path: Path) -> None:
    """Of 14 million parameters, and a small batch."""
    preset = PRESETS["gpt-small"]
    config = RunConfig(with_usual_vocabulary(preset), DataConfig(tokenizer="bytes"), preset.training)
    few = {"batch_size": 1, "steps": 9, "save_every": 4, "eval_every": 100}
    trainer = trainer_for(tmp_path / "run", text, configured(config, **few, precision="fp32", compile="off"))
    seconds: dict[str, list[float]] = {"_save": [], "_step": []}

    def timed(name: str) -> None:
        work = getattr(trainer, name)

        def called() -> None:
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)

        setattr(trainer, name, called)

    timed("_save")
    timed("_step")
    trainer.train()
    assert median(seconds["_save"]) < median(seconds["_step"])
