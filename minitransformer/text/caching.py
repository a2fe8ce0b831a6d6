"""A cache on disk of records, tokenizers and folders, with checksums that are verified on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from minitransformer.errors import UserError
from minitransformer.files import locked, sealed, sha256, unsealed, whole_folder, write_text
from minitransformer.processes import processors
from minitransformer.records import read_json, whole_record
from minitransformer.text.threads import in_order
from minitransformer.text.tokenizers import Tokenizer

SUMS = "sha256.json"
"""file with the digests of a prepared folder's files"""
BLOCK = 1 << 26
"""bytes per hashed block"""
T = TypeVar("T")


def hash_of(content: Any) -> str:
    """sha256 of the JSON of `content`."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """The SHA-256 of the SHA-256s of the blocks of a file, which are hashed in parallel."""
    size = path.stat().st_size

    def block(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    starts = range(0, size, BLOCK)
    return hashlib.sha256(b"".join(in_order(block, starts, min(processors(), len(starts)) or 1))).hexdigest()


def write_sums(folder: Path) -> None:
    """Write the digests of all files in `folder`."""
    write_text(folder / SUMS, json.dumps(sealed({path.name: digest_of(path) for path in sorted(folder.iterdir())})))


def is_damaged(folder: Path) -> bool:
    """Whether a file of the prepared `folder` fails its checksum; old folders have none."""
    try:
        if not (folder / SUMS).exists():
            return False
        sums = unsealed(read_json(folder / SUMS, "make it anew"))
        return any(digest_of(folder / name) != digest for name, digest in sums.items())
    except (OSError, ValueError, UserError):
        return True


def build_once(folder: Path, build: Callable[[Path], None], load: Callable[[Path], T | None]) -> T:
    """Load `folder`; if it is missing, one process builds it while others wait.

    A folder with a damaged file is rebuilt.
    """

    def found() -> T | None:
        return None if is_damaged(folder) else load(folder)

    if (content := found()) is not None:
        return content
    with locked(folder):
        content = found()
        if content is None:
            with whole_folder(folder) as partial:
                build(partial)
                write_sums(partial)
            content = load(folder)
    assert content is not None, f"{folder} was built and cannot be opened"
    return content


def fit_once(path: Path, fit: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in the file at `path`; fitted if the file is missing or damaged."""
    sums = path.with_suffix(".sha256")
    with locked(path):
        with suppress(UserError, OSError):
            if not sums.exists() or sums.read_text() == sha256(path):
                return Tokenizer.load(path)
        tokenizer = fit()
        tokenizer.save(path)
        write_text(sums, sha256(path))
    return tokenizer


def note_once(path: Path, kind: type[T], find: Callable[[], T]) -> T:
    """The dataclass `kind` in the file at `path`; computed by `find` if the file is missing or damaged."""
    with suppress(UserError, ValueError):
        return whole_record(kind, unsealed(read_json(path, "make it anew")), "a text", str(path))
    content = find()
    write_text(path, json.dumps(sealed(vars(content))))
    return content
