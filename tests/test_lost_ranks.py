"""Runs under torchrun: ranks that are killed, stopped, hang, fail or get a signal, restarts, and several nodes."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from minitransformer.commands.train import main
from minitransformer.runs import Run
from tests.launch_for_tests import SMALL, Launch, has_ended, until, write_script
from tests.runs_for_tests import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc"),
]
TEXT = ("--data", "text.txt")
LONG = (*TEXT, "--out", "run", "--steps", "100000")

HANGING = """
import os, time
from minitransformer.training import liveness
from minitransformer.training.loader import Loader

liveness.HANG = 1
batches = Loader.training_batches

def training_batches(self, step):
    while step == 5 and os.environ["RANK"] == "1":
        time.sleep(1)
    return batches(self, step)

Loader.training_batches = training_batches
"""

FAILING = """
import os
from minitransformer.errors import StorageError
from minitransformer.training import parallel

def full(*_):
    raise StorageError("there is no space left")

if os.environ["RANK"] == "1":
    assert hasattr(parallel, "build_in_parts")
    parallel.build_in_parts = full
"""


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run) if "loss" in record]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process over 40 steps."""
    folder = tmp_path_factory.mktemp("alone")
    write_script(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MINITRANSFORMER_DATA", str(folder / "prepared"))
        assert main([*SMALL, *TEXT, "--out", "run", "--steps", "40"]) == 0
    return losses(folder / "run")


def test_torchrun_continues_after_a_killed_rank_as_if_nothing_had_happened(tmp_path: Path, alone: list[float]) -> None:
    flags = (*TEXT, "--steps", "40", "--rank-timeout", "6")
    with Launch(tmp_path, *flags, torchrun=("--standalone", "--max-restarts=1")) as launch:
        launch.wait_for_step(25, "runs/gpt-micro-text")
        os.kill(launch.process(1), signal.SIGKILL)
        assert launch.end() == {}
    [error] = launch.errors()
    assert error.startswith("error: rank 1 (process ")
    assert "--resume runs/gpt-micro-text" in error
    assert launch.errors(attempt=1) == []
    assert "checkpoint" not in launch.said("stdout", 0, attempt=1)  # it has not begun anew
    assert losses(tmp_path / "runs/gpt-micro-text") == pytest.approx(alone, rel=1e-5)


def test_a_stopped_rank_ends_the_others_within_the_timeout(tmp_path: Path) -> None:
    with Launch(tmp_path, *LONG, "--rank-timeout", "6") as launch:
        launch.wait_for_checkpoint()
        stopped, other = launch.process(0), launch.process(1)
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: has_ended(other), seconds=10)
        os.kill(stopped, signal.SIGKILL)
        assert launch.end() == {0: -signal.SIGKILL, 1: 1}
    [error] = launch.errors()
    assert error.startswith(f"error: rank 0 (process {stopped} on ")
    assert error.endswith("train.py --resume run")
    assert Run.open(tmp_path / "run").load_model("latest")


def test_a_rank_that_hangs_is_named_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    with Launch(tmp_path, *LONG, "--plugin", "hanging.py", "--rank-timeout", "5") as launch:
        codes = launch.end()
    assert sorted(codes.values())[-1] == 1
    [error] = launch.errors()
    assert "no step has ended for " in error
    assert "rank 1 (process " in error
    assert "rank 0" not in error
    assert "(next_batches)" in error or "learner.py" in error


def test_an_error_of_one_rank_is_reported_once_with_its_name_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    with Launch(tmp_path, *LONG, "--plugin", "failing.py") as launch:
        assert launch.end() == {0: 1, 1: 1}
    [error] = launch.errors()
    assert error.startswith("error: rank 1 (process ")
    assert error.endswith(": there is no space left")


def test_a_notice_to_one_rank_stops_all_after_saving(tmp_path: Path) -> None:
    write_script(tmp_path)
    with (
        (tmp_path / "text.txt").open("rb") as text,
        Launch(tmp_path, "--data", "-", "--out", "run", "--steps", "100000", stdin=text) as launch,
    ):
        launch.wait_for_step(12)
        os.kill(launch.process(1), signal.SIGUSR1)
        assert launch.end() == {0: 143, 1: 143}
    assert launch.errors() == []
    said = launch.said("stdout", 0).split()
    assert launch.said("stdout", 1) == ""
    step = int(said[said.index("stopped") + 3].rstrip(","))
    assert Run.open(tmp_path / "run").load_model(f"step-{step:06}")
    assert " ".join(said).endswith(f"--log-dir={launch.logs} train.py --resume run")
    assert "torchrun --standalone --nproc_per_node=2" in " ".join(said)


def test_a_second_interrupt_does_not_wait_for_another_rank(tmp_path: Path) -> None:
    with Launch(tmp_path, *LONG, "--rank-timeout", "60") as launch:
        launch.wait_for_checkpoint()
        main_rank, stopped = launch.process(0), launch.process(1)
        os.kill(stopped, signal.SIGSTOP)
        os.kill(main_rank, signal.SIGINT)
        time.sleep(0.5)
        os.kill(main_rank, signal.SIGINT)
        until(lambda: has_ended(main_rank), seconds=15)
        os.kill(stopped, signal.SIGKILL)
        launch.end()
    assert [error for error in launch.errors() if error] == ["interrupted"]
    assert Run.open(tmp_path / "run").load_model("latest")


def test_two_nodes_of_two_ranks_have_the_losses_of_one_process(tmp_path: Path, alone: list[float]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=nodes")
    flags = (*TEXT, "--out", "run", "--steps", "40")
    with (
        Launch(tmp_path, *flags, torchrun=meeting, logs="first") as first,
        Launch(tmp_path, *flags, torchrun=meeting, logs="second") as second,
    ):
        assert first.end() == second.end() == {}
    assert first.errors() == second.errors() == []
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
