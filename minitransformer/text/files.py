"""Where made files live, and how they appear: whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import minitransformer
from minitransformer.errors import UserError

PACKAGE = Path(minitransformer.__file__).parent
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


def recipe_folder() -> Path:
    """The folder of the recipes: inside an installed package, or `data/` beside the package in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "data"


def work_folder() -> Path:
    """Where recipes and prepared tokens are kept.

    `MINITRANSFORMER_DATA` if set; else a checkout's `data/` if writable; else `~/.cache/minitransformer`.
    """
    if chosen := os.environ.get("MINITRANSFORMER_DATA"):
        return Path(chosen).expanduser()
    checkout = PACKAGE.parent / "data"
    if recipe_folder() == checkout and os.access(checkout, os.W_OK):
        return checkout
    return Path.home() / ".cache" / "minitransformer"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns a full disk and a folder that may not be written into a `UserError` about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"no space left while writing {target}: free some, or set MINITRANSFORMER_DATA to another disk"
            ) from None
        if error.errno in NO_RIGHT:
            raise UserError(
                f"{target} may not be written ({error.strerror}): set MINITRANSFORMER_DATA to a folder that may"
            ) from None
        raise


def sync(path: Path) -> None:
    """Returns when the file or folder at `path` would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `target` when the block ends well, and nothing when it does not."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files for the owner alone; a shared work folder wants the usual rights.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, target)
            sync(target.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `target` when the block ends well, and nothing when it does not.

    Call it under `locked(target)`: then what stands at `target` or in an earlier partial folder is nobody's.
    """
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-", suffix=".partial"))
    try:
        yield partial
        partial.chmod(target.parent.stat().st_mode & 0o777)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _lock(descriptor: int, *, wait: bool) -> bool:
    """True when this process now holds the lock; the kernel gives it back however the process ends."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time per `target`; a file system without locks lets everybody in (names stay unique)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(descriptor, wait=False):
            print(f"waiting for another process to make {target}", file=sys.stderr)
            _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Deletes the partial folders of builders that were killed: those whose lock nobody holds."""
    for partial in folder.glob("*.partial"):
        lock = folder / f"{partial.name.rpartition('-')[0]}.lock"
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:
            continue
        try:
            if _lock(descriptor, wait=False):
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(descriptor)
