"""A run under torchrun, whose ranks tests signal and kill one by one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minitransformer

ROOT = Path(minitransformer.__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SMALL = (
    *("--tokenizer", "bytes", "--num-layers", "1", "--d-model", "16", "--num-heads", "2"),
    *("--context-length", "16", "--batch-size", "4", "--precision", "fp32", "--dropout", "0.1", "--log-every", "1"),
    *("--eval-every", "1000000", "--save-every", "10", "--validation-tokens", "200"),
)


def has_ended(pid: int) -> bool:
    """Whether the process has ended, though its parent may not know."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(holds: Callable[[], Any], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class Launch:
    """`torchrun … train.py …` in `folder`, on `ranks` ranks of a node; their output is in files."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        ranks: int = 2,
        torchrun: tuple[str, ...] = ("--standalone",),
        logs: str = "logs",
        stdin: int | IO[bytes] = subprocess.DEVNULL,
    ) -> None:
        self.folder, self.logs = folder, folder / logs
        write_script(folder)
        environment = {
            **os.environ,
            **{
                "OMP_NUM_THREADS": "1",
                "MINITRANSFORMER_DATA": str(folder / f"prepared-{logs}"),
                "PYTHONPATH": str(ROOT),
            },
        }
        options = [*torchrun, f"--nproc_per_node={ranks}", "--redirects=3", f"--log-dir={self.logs}"]
        self.torchrun = subprocess.Popen(
            [*TORCHRUN, *options, "train.py", *SMALL, *flags],
            cwd=folder,
            env=environment,
            stderr=(folder / f"{logs}.txt").open("w"),
            stdin=stdin,
        )

    def process(self, rank: int) -> int:
        """The process of `rank`."""
        wanted = f"\0LOCAL_RANK={rank}\0".encode()
        return next(pid for pid in children(self.torchrun.pid) if wanted in Path(f"/proc/{pid}/environ").read_bytes())

    def wait_for_step(self, step: int, run: str = "run") -> None:
        metrics = self.folder / run / "metrics.jsonl"
        until(
            lambda: self.torchrun.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= step)
        )
        assert self.torchrun.poll() is None, self.errors()

    def wait_for_checkpoint(self, run: str = "run") -> None:
        """Checkpoints are written beside training."""
        self.wait_for_step(1, run)
        until((self.folder / run / "checkpoints/latest").exists)

    def said(self, stream: str, rank: int, attempt: int = 0) -> str:
        """What `rank` has written to `stream` in an attempt."""
        [path] = self.logs.glob(f"*/attempt_{attempt}/{rank}/{stream}.log")
        return path.read_text()

    def errors(self, attempt: int = 0) -> list[str]:
        """All lines of all ranks on standard error."""
        paths = sorted(self.logs.glob(f"*/attempt_{attempt}/*/stderr.log"))
        return [line for path in paths for line in path.read_text().splitlines()]

    def end(self, seconds: float = 90) -> dict[int, int]:
        """The exit codes of the ranks, as torchrun reports them; empty if all are 0."""
        self.torchrun.wait(seconds)
        report = (self.folder / f"{self.logs.name}.txt").read_text().splitlines()
        words = [line.split() for line in report if line.strip().startswith(("rank  ", "exitcode"))]
        return {int(rank[2]): int(code[2]) for rank, code in zip(words[::2], words[1::2], strict=True)}

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.torchrun.poll() is None:
            for pid in [*children(self.torchrun.pid), self.torchrun.pid]:
                os.kill(pid, signal.SIGKILL)
        self.torchrun.wait()


def write_script(folder: Path) -> None:
    """Write a text, and `train.py`, into `folder`."""
    (folder / "text.txt").write_text("".join(f"{i} the quick brown fox counts {i * i}.\n" for i in range(200)))
    (folder / "train.py").write_bytes((ROOT / "train.py").read_bytes())
