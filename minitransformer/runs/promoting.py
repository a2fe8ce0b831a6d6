"""Which run is served in place of another: a record in the folder of the first one, which a server follows.

The record is replaced as a whole, so that a reader finds the run before or the run after, and nothing in between.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.records import read_json, shown, whole_record
from minitransformer.runs.open import Run

SERVED = "served.json"
REMEDY = "make the folder writable"


@dataclass(frozen=True)
class Promotion:
    """A checkpoint of a run that is served from then on, and why."""

    run: str
    """its folder, relative to the one that the server was told"""
    checkpoint: str
    since: str
    why: str


def promotions_over(path: Path) -> list[Promotion]:
    """What was promoted over the run at `path`, the one that is served last; raises `StorageError` if damaged."""
    record = path / SERVED
    if not record.exists():
        return []
    found = read_json(record, f"remove it, and {path} itself is served")
    rows = found.get("promotions")
    if not isinstance(rows, list):
        raise StorageError(f"{record} has promotions {shown(rows)}, which must be a list: remove it")
    return [whole_record(Promotion, row, "a promotion", str(record)) for row in rows]


def served_checkpoint(path: Path) -> tuple[Path, str | None]:
    """The run that is served for `path`, and the checkpoint of it; None is the best, or else the latest."""
    promotions = promotions_over(path)
    return (folder_of(path, promotions[-1]), promotions[-1].checkpoint) if promotions else (path, None)


def folder_of(path: Path, promotion: Promotion) -> Path:
    """The folder of what was promoted over `path`."""
    return Path(os.path.normpath(path / promotion.run))


def promote_over(path: Path, new: Run, checkpoint: str, why: str) -> Promotion:
    """Have `new` served for `path` from now on."""
    where = os.path.relpath(new.path.resolve(), path.resolve())
    promotion = Promotion(where, checkpoint, datetime.now().astimezone().isoformat(timespec="seconds"), why)
    with files.locked(path / SERVED, REMEDY):
        _write(path, [*promotions_over(path), promotion])
    return promotion


def go_back(path: Path) -> Promotion:
    """Have what was served before the last promotion served again; raises `UserError` if there was none."""
    with files.locked(path / SERVED, REMEDY):
        promotions = promotions_over(path)
        if not promotions:
            raise UserError(f"nothing was promoted over {path}: there is nothing to go back from")
        before, left = promotions[:-1], promotions[-1]
        folder = folder_of(path, before[-1]) if before else path
        Run.open(folder).checkpoint(before[-1].checkpoint if before else None)
        _write(path, before)
    return left


def _write(path: Path, promotions: list[Promotion]) -> None:
    content: dict[str, Any] = {"promotions": [asdict(each) for each in promotions]}
    with files.writing(path / SERVED, REMEDY):
        files.write_text(path / SERVED, json.dumps(content, indent=2) + "\n")
