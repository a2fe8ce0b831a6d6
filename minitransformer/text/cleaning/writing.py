"""The cleaned files: the documents that are kept, as their files had them, in files of the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from shutil import copyfileobj
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import locked, make_folder, whole_file, write_text, writing
from minitransformer.processes import in_processes
from minitransformer.records import read_json
from minitransformer.text.cleaning.config import Changes, CleaningConfig
from minitransformer.text.cleaning.examination import KEPT, BlockOfFile, reason_of
from minitransformer.text.cleaning.personal import PersonalData, masked
from minitransformer.text.cleaning.verdicts import Job, Verdicts
from minitransformer.text.pairs import OnRead
from minitransformer.text.threads import progress_bar

STATE, REMOVED, REPORT_PAGE, REPORT_JSON = ".cleaning.json", "removed.jsonl", "report.html", "report.json"
"""files of ours in the folder of cleaned files"""
BEGINNING = 100
"""characters of a removed document that are shown"""
OTHER_FOLDER = "choose another --out"


class JudgedBlock(NamedTuple):
    """A block with the verdicts on its documents; without a block, the end of a file."""

    block: BlockOfFile | None
    codes: npt.NDArray[np.uint8]
    first: int = 0
    """number of its first document, over all files"""


class Written(NamedTuple):
    """What is written of a block, and what is removed: number, verdict and beginning of each document."""

    content: Any
    removed: list[tuple[int, int, str]]


def check_out(out: Path, job: Job) -> None:
    """Raises `UserError` if `out` holds anything but an earlier run of this job, or lies in a folder that is read."""
    place = out.resolve()
    for name in job.sources.names:
        if (folder := Path(name).expanduser()).is_dir() and folder.resolve() in (place, *place.parents):
            raise UserError(f"--out {out} is in {name}, whose files are read: {OTHER_FOLDER}")
    for file in job.sources.files:
        if str(job.sources.place(file)) in (STATE, REMOVED, REPORT_PAGE, REPORT_JSON):
            raise UserError(f"{file.path} has the name of a file that clean writes: rename it")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if any(out.iterdir()):
        known = read_json(out / STATE, OTHER_FOLDER) if (out / STATE).exists() else {}
        if known.get("identity") != job.identity:
            raise UserError(f"--out {out} holds other files: {OTHER_FOLDER}, or remove it")


def write_cleaned(out: Path, job: Job, verdicts: Verdicts) -> None:
    """Write the cleaned files and `removed.jsonl` to the folder `out`; files of an earlier run of this job are kept."""
    with writing(out, OTHER_FOLDER), locked(job.folder):
        check_out(out, job)
        make_folder(out)
        write_text(out / STATE, json.dumps({"identity": job.identity}))
        names = [out / job.sources.place(file) for file in job.sources.files]
        missing = [number for number, name in enumerate(names) if not name.exists()]
        with progress_bar("writing", job.sources.size, job.progress) as bar:
            blocks = _judged_blocks(job, verdicts, missing, bar.update)
            parts = in_processes(partial(write_block, job.config), blocks, job.workers)
            for number in missing:
                _write_file(names[number], number, job, verdicts, parts)
        job.check_unchanged()
        with whole_file(out / REMOVED) as removed:
            for number in range(len(names)):
                with _removed_of(job, number).open("rb") as part:
                    copyfileobj(part, removed)


def _removed_of(job: Job, number: int) -> Path:
    return job.folder / "removed" / f"{number:08}.jsonl"


def _judged_blocks(job: Job, verdicts: Verdicts, missing: list[int], on_read: OnRead) -> Iterator[JudgedBlock]:
    """The blocks of each file that is `missing`, with the end of each."""
    for number in missing:
        file, start = job.sources.files[number], verdicts.begins[number]
        counts = (count for owner, count in verdicts.journal.blocks if owner == number)
        for content, count in zip(file.blocks(on_read, whole=True), counts, strict=True):
            yield JudgedBlock(BlockOfFile(number, file, content), verdicts.codes[start : start + count], start)
            start += count
        yield JudgedBlock(None, np.empty(0, np.uint8))


def _write_file(target: Path, number: int, job: Job, verdicts: Verdicts, parts: Iterator[Written | None]) -> None:
    """Write the `parts` of one file up to its end, and what was removed of it."""
    rules = [rule.name for rule in job.config.rules]
    with whole_file(_removed_of(job, number)) as removed, whole_file(target) as file:
        sink = job.sources.files[number].open_sink(file)
        for part in iter(partial(next, parts), None):
            sink.write(part.content)
            for document, code, beginning in part.removed:
                entry = {**_place(document, job, verdicts), "reason": reason_of(code, rules)}
                if (original := verdicts.original_of(document)) is not None:
                    entry["original"] = _place(original, job, verdicts)
                entry["text"] = beginning
                removed.write(json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n")
        sink.close()


def _place(document: int, job: Job, verdicts: Verdicts) -> dict[str, Any]:
    """Where a document stands: its file, and its number in the file."""
    file, number = verdicts.location(document)
    return {"file": str(job.sources.place(job.sources.files[file])), "document": number}


@lru_cache(maxsize=1)
def _changes(config: CleaningConfig) -> Changes:
    """The changes of a process, which makes them once."""
    return Changes(config)


def write_block(config: CleaningConfig, judged: JudgedBlock) -> Written | None:
    """What is written of a block; None for the end of a file."""
    if judged.block is None:
        return None
    changes = _changes(config)
    file, content = judged.block.file, judged.block.content
    kept, removed = [], []
    for number, (unit, code) in enumerate(zip(file.parse(content), judged.codes.tolist(), strict=True)):
        if code == KEPT:
            kept.append((number, unit, changes.new_text(unit.text)))
        else:
            beginning = changes.of(unit.text[: 2 * BEGINNING])
            shown = masked(beginning[0], beginning[2], list(PersonalData.registry))
            removed.append((judged.first + number, code, shown[:BEGINNING]))
    return Written(file.render(content, kept), removed)
