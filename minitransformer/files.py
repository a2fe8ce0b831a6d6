"""Atomic writes of files and folders, locks and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minitransformer.errors import StorageError

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from torch import Tensor

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}
PARTIAL, REPLACED, CHECKSUM = ".partial", ".replaced", "checksum"


@contextmanager
def writing(target: Path, remedy: str) -> Iterator[None]:
    """Turn an `OSError` while writing `target` into a `StorageError` with the remedy.

    The disk may be full, read-only, broken, or gone.
    """
    try:
        yield
    except OSError as error:
        # A broken pipe or connection is not a disk error.
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        raise _explained(error, target, remedy) from None


def _explained(error: OSError, target: Path, remedy: str) -> StorageError:
    if error.errno in NO_SPACE:
        return StorageError(f"no space left while writing {target}: free some, or {remedy}")
    if error.errno in NO_RIGHT:
        return StorageError(f"{target} cannot be written ({error.strerror}): {remedy}")
    where = "" if error.filename is None else f": {error.filename}"
    return StorageError(f"{target} could not be written ({error.strerror}{where}): restore the folder, or {remedy}")


def sync(path: Path) -> None:
    """Flush the file or folder at `path` to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """`path`, or the nearest parent that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents, flushed to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file that becomes `target` if the block succeeds, and is deleted otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private to the owner; others may have to read these.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
        sync(target.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` atomically."""
    with whole_file(target) as file:
        file.write(text.encode())


def write_tensors(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` into the safetensors file `target`; raises `OSError` where it cannot be written."""
    from safetensors import SafetensorError  # late: most callers write no tensors
    from safetensors.torch import save_file

    try:
        save_file(tensors, target, metadata)
    except SafetensorError as error:
        # safetensors reports the OS error number only in its message.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(target)) from None


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` if the block succeeds, and is deleted otherwise.

    An existing `target` is replaced, and one version is on disk at all times: `restore_replaced`
    repairs a kill between the two renames. Hold a lock if several processes may write it.
    """
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-", suffix=PARTIAL))
    replaced = target.with_name(target.name + REPLACED)
    try:
        yield partial
        partial.chmod(target.parent.stat().st_mode & 0o777)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if target.exists():
            remove(replaced)
            target.rename(replaced)
        partial.rename(target)
        sync(target.parent)
        remove(replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


def restore_replaced(folder: Path) -> None:
    """Repair a `whole_folder` that was killed in `folder`: restore the old version unless the new one is in place."""
    for replaced in folder.glob(f"*{REPLACED}"):
        target = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if target.exists():
            remove(replaced)
        else:
            replaced.rename(target)
            sync(folder)


def remove(path: Path) -> None:
    """Remove the file, link or folder at `path`, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def acquired(path: Path, *, wait: bool) -> BaseFileLock | None:
    """Acquire the lock file `path`, held until it is released or the process ends.

    None if another process holds it and `wait` is False. Without lock support on the disk, it always succeeds.
    """
    from filelock import FileLock, Timeout  # late: commands that only read need no locks

    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


def lock_of(target: Path) -> Path:
    """The lock file for writing `target`."""
    return target.with_name(f"{target.name}.lock")


@contextmanager
def locked(target: Path, remedy: str | None = None) -> Iterator[None]:
    """Hold the lock of `target`; with a `remedy`, failure to create its folder is a `StorageError`."""
    with nullcontext() if remedy is None else writing(target.parent, remedy):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = acquired(lock_of(target), wait=False)
        if lock is None:
            print(f"waiting for another process to write {target}", file=sys.stderr)
            lock = acquired(lock_of(target), wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Delete unfinished files of killed processes in `folder`, unless their lock is held.

    Replaced versions are deleted too: whatever is written under such a lock can be rebuilt.
    """
    for leftover in [*folder.glob(f"*{PARTIAL}"), *folder.glob(f"*{REPLACED}")]:
        name = leftover.name.removesuffix(REPLACED)
        path = lock_of(folder / (name.rpartition("-")[0] if name.endswith(PARTIAL) else name))
        if not path.exists() or (lock := acquired(path, wait=False)) is None:
            continue
        try:
            remove(leftover)
        finally:
            lock.release()


def point_to(link: Path, target: str) -> None:
    """Atomically point the symbolic link `link` to its sibling `target`."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}{PARTIAL}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the SHA-256 of its JSON as `checksum`."""
    content = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {**record, CHECKSUM: hashlib.sha256(content.encode()).hexdigest()}


def unsealed(record: Any) -> Any:
    """`record` without its checksum, which old files lack.

    Raises `ValueError` if the checksum does not match.
    """
    if not isinstance(record, dict) or CHECKSUM not in record:
        return record
    content = {name: value for name, value in record.items() if name != CHECKSUM}
    if sealed(content)[CHECKSUM] != record[CHECKSUM]:
        raise ValueError("its checksum does not match its content")
    return content
