"""Faults of machines, disks and files, each with what may come of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from minitransformer.errors import StorageError
from minitransformer.registry import Registered
from minitransformer.reliability.disturbed_runs import REFUSED, Broken, DisturbedRun
from minitransformer.reliability.injection import BALLAST
from minitransformer.reliability.launcher import Ended, Strike

DISK = "size=12m"
"""small, so that it is full soon"""


class Fault(Registered, kind="fault"):
    """Something that happens to a run; the run must then end as one that was not disturbed, or be refused."""

    about = ""
    of_a_rank = False
    """whether it needs several ranks"""

    @classmethod
    def why_not(cls) -> str | None:
        """Why it cannot be tried here, in words; None if it can."""
        return None

    def try_on(self, case: DisturbedRun) -> str:
        """The result: equal, near or refused. Raises `Broken` for any other."""
        raise NotImplementedError


class Kill(Fault, name="kill"):
    """kill -9 of all ranks at a random time."""

    about = "kill -9 at a random time"

    def try_on(self, case: DisturbedRun) -> str:
        case.begin_struck(lambda seconds: Strike(after=case.draw.uniform(0, seconds)))
        return case.finish()


class KillAtWrite(Fault, name="kill-write"):
    """kill -9 of a rank at a random change of the disk: in the preparation of data, or in saving."""

    about = "kill -9 as it writes"

    def try_on(self, case: DisturbedRun) -> str:
        calls = case.reference.calls
        rank = case.draw.choice([rank for rank, count in enumerate(calls) if count])
        case.begin_struck(lambda _: Strike(rank=rank, at=case.draw.randint(1, calls[rank])))
        return case.finish()


class KillRank(Fault, name="kill-rank"):
    """kill -9 of one rank at a random time; the others must end by themselves."""

    about = "kill -9 of one rank"
    of_a_rank = True
    signal = signal.SIGKILL

    def try_on(self, case: DisturbedRun) -> str:
        rank, begun = case.draw.randrange(case.kind.ranks), case.run / "config.json"
        share = case.reference.training_share
        case.begin_struck(lambda seconds: Strike(rank, case.draw.uniform(0, share * seconds), self.signal, begun))
        return case.finish()


class StopRank(KillRank, name="stop-rank"):
    """SIGSTOP of one rank at a random time, which then does not answer; the others must end by themselves."""

    about = "SIGSTOP of one rank"
    signal = signal.SIGSTOP


class FullDisk(Fault, name="full-disk"):
    """A disk that is full from a random change on, and has room again when the run is resumed."""

    about = "full disk"

    def try_on(self, case: DisturbedRun) -> str:
        at = case.draw.randint(1, case.reference.calls[0])
        if not can_mount():
            case.prepare()
            size = int(10 ** case.draw.uniform(0, 5))
            return self._go_on(case, case.begin(Strike(rank=0, at=at, fault="limit", size=size)))
        with small_disk(case.folder):
            case.prepare()
            ended = case.begin(Strike(rank=0, at=at, fault="fill"))
            (case.folder / BALLAST).unlink(missing_ok=True)
            return self._go_on(case, ended)

    def _go_on(self, case: DisturbedRun, ended: Ended) -> str:
        if not ended.done and not ended.in_one_sentence:
            raise Broken(f"it ended with {ended.codes}")
        return case.finish()


class ReadOnly(Fault, name="read-only"):
    """A folder that may not be written while the run is resumed, and may be later."""

    about = "read-only folder"

    @classmethod
    def why_not(cls) -> str | None:
        if can_mount() or os.geteuid() != 0:
            return None
        return "this user may write everywhere, and may not mount a disk"

    def try_on(self, case: DisturbedRun) -> str:
        if not can_mount():
            case.begin_half()
            with _without_right(case.run):
                self._refused(case)
            return case.finish()
        with small_disk(case.folder):
            case.begin_half()
            _remount(case.folder, "ro")
            self._refused(case)
            _remount(case.folder, "rw")
            return case.finish()

    def _refused(self, case: DisturbedRun) -> None:
        if not case.resume().in_one_sentence:
            raise Broken("a run in a read-only folder goes on")


class Truncated(Fault, name="truncate"):
    """A file of the run, or of its prepared data, that ends too early."""

    about = "truncated file"

    def try_on(self, case: DisturbedRun) -> str:
        case.begin_half()
        path = self.file_of(case)
        self.damage(case, path)
        if not case.resume().done:
            return REFUSED
        try:
            return case.compared(spared=path.name)
        except StorageError:  # the best checkpoint, which resuming does not read
            return REFUSED

    def file_of(self, case: DisturbedRun) -> Path:
        return case.draw.choice(files_in(case.run, case.folder / "work"))

    def damage(self, case: DisturbedRun, path: Path) -> None:
        os.truncate(path, case.draw.randrange(path.stat().st_size))


class Flipped(Truncated, name="flip"):
    """A file of the run, or of its prepared data, with one bit changed."""

    about = "flipped bit in a file"

    def damage(self, case: DisturbedRun, path: Path) -> None:
        flip_bit(path, case.draw.randrange(path.stat().st_size), case.draw.randrange(8))


class ChangedData(Truncated, name="changed-data"):
    """A data file that was changed between saving and resuming."""

    about = "changed data file"

    def file_of(self, case: DisturbedRun) -> Path:
        return case.folder / "my.txt"

    def damage(self, case: DisturbedRun, path: Path) -> None:
        text = path.read_text()
        place = case.draw.randrange(len(text))
        path.write_text(text[:place] + case.draw.choice(["", "x", "another line\n"]) + text[place + 1 :])


def files_in(*folders: Path) -> list[Path]:
    """The files below `folders` that hold something, except locks, each once, in order."""
    found = [path.resolve() for folder in folders for path in folder.rglob("*")]
    return sorted({path for path in found if path.is_file() and path.stat().st_size and path.suffix != ".lock"})


def flip_bit(path: Path, place: int, bit: int) -> None:
    """Change one bit of byte `place` of the file at `path`."""
    with path.open("rb+") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


@contextmanager
def small_disk(path: Path, options: str = DISK) -> Iterator[None]:
    """A small disk at `path`, in memory; raises `OSError` if mounting is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if made.returncode != 0:
        raise PermissionError(f"mounting is not allowed here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@cache
def can_mount() -> bool:
    """Whether this user may mount a disk in memory."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder)):
                return True
        except OSError:
            return False


def _remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


@contextmanager
def _without_right(run: Path) -> Iterator[None]:
    """Folders of `run` that may not be written."""
    folders = [run, *(path for path in run.rglob("*") if path.is_dir() and not path.is_symlink())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)
