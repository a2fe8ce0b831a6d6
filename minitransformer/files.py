"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from minitransformer.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def writing(target: Path, remedy: str) -> Iterator[None]:
    """Turns a full disk and a folder that may not be written into a `UserError` about `target`, with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(f"no space left while writing {target}: free some, or {remedy}") from None
        if error.errno in NO_RIGHT:
            raise UserError(f"{target} may not be written ({error.strerror}): {remedy}") from None
        raise


def sync(path: Path) -> None:
    """Returns when the file or folder at `path` would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `target` when the block ends well, and nothing when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; others may have to read these.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
        sync(target.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Make `text` the content of `target`."""
    with whole_file(target) as file:
        file.write(text.encode())


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill that becomes `target` when the block ends well, and nothing when it does not.

    It replaces a folder that stands at `target`; where several processes may want to, call it under `locked(target)`.
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
    try:
        import fcntl
    except ImportError:  # a system without them
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time per `target`; where there are no locks, everybody gets in (names stay unique)."""
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


def point_to(link: Path, target: str) -> None:
    """Make the symbolic link `link` point to its sibling `target`, in one stroke."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
