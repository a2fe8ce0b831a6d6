"""Run folders: names, locks and provenance."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.pretrained.originals import CHAT
from minitransformer.pretrained.originals import FOLDER as ORIGINALS
from minitransformer.pretrained.tokenizers import CONFIGS
from minitransformer.training.checkpoint import CHECKPOINTS, LOCK, checkpoint_step, checkpoints_in
from minitransformer.training.ranks import Ranks

CONFIG, TOKENIZER, TARGET_TOKENIZER = "config.json", "tokenizer.json", "target-tokenizer.json"
GENERATION = CONFIGS[1]
REMEDY = "choose an --out on another disk"


def provenance() -> dict[str, str]:
    """The code version, the machine and the command that made a run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "minitransformer": version("minitransformer"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": shlex.join(sys.argv),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def latest_run(root: Path = Path("runs")) -> Path:
    """The most recently written run in `root`; raises `UserError` if there is none."""
    found = [path.parent for path in root.glob(f"*/{CONFIG}")]
    if not found:
        raise UserError(f"there is no run in {root}/: train one with `python train.py`, or name its folder")
    return max(found, key=lambda path: (path / CHECKPOINTS).stat().st_mtime if (path / CHECKPOINTS).exists() else 0)


def free_run_path(name: str, root: Path = Path("runs")) -> Path:
    """An unused path in `root`: `name`, or `name` with a number."""
    candidates = [root / name, *(root / f"{name}-{i}" for i in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())


def claimed_run_path(name: str, root: Path = Path("runs")) -> Path:
    """Create a new folder at `free_run_path`, exclusively for this process."""
    with files.writing(root, REMEDY):
        files.make_folder(root)
        while True:
            path = free_run_path(name, root)
            with suppress(FileExistsError):
                path.mkdir()
                return path


def check_free(path: Path) -> None:
    """Raise a `UserError` unless a run may start at `path`.

    It may if there is nothing, or only the remains of a run that ended before its folder was complete.
    """
    if (path / CONFIG).exists():
        raise UserError(f"{path} already exists: choose another --out, or continue the run by train.py --resume {path}")
    if not path.exists():
        return
    own = {LOCK, TOKENIZER, TARGET_TOKENIZER, CHECKPOINTS}
    with files.writing(path, REMEDY):
        names = {child.name for child in path.iterdir() if child.suffix != files.PARTIAL} if path.is_dir() else {""}
        if LOCK in names:  # public checkpoints have files of these names too
            own |= {ORIGINALS, GENERATION, CHAT}
        begun = any(checkpoint_step(checkpoint) > 0 for checkpoint in checkpoints_in(path / CHECKPOINTS))
    if begun or not names <= own:
        raise UserError(f"{path} already exists and is not a run: choose another --out")


def clear(path: Path) -> None:
    """Remove everything in a run folder except its lock."""
    for child in path.iterdir():
        if child.name != LOCK:
            files.remove(child)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the write lock of the run at `path`, and first remove temporary files of killed processes.

    Raises `UserError` if another process is training the run. Reading needs no lock.
    """
    with files.writing(path, REMEDY):
        files.make_folder(path)
        lock_file = path / LOCK
        holder = lock_file.read_text(errors="replace").strip() if lock_file.exists() else ""
        lock = files.acquired(lock_file, wait=False)
        if lock is None:
            who = f" (pid {holder})" if holder.isdecimal() else ""
            raise UserError(f"another process is training {path}{who}: wait until it ends, or stop it")
    try:
        with suppress(OSError):  # the pid is only for the error message of others
            lock_file.write_text(f"{os.getpid()}\n")
        with files.writing(path, REMEDY):
            for folder in (path, path / CHECKPOINTS):
                files.restore_replaced(folder)
                for leftover in folder.glob(f"*{files.PARTIAL}"):
                    files.remove(leftover)
        yield
    finally:
        lock.release()


def only_writer_of(ranks: Ranks, path: Path) -> AbstractContextManager[None]:
    """`only_writer`, held by the main rank for all `ranks`."""
    return only_writer(path) if ranks.is_main else nullcontext()
