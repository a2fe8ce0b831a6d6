"""What becomes of each document: documents are examined in processes, then compared with each other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import locked, writing
from minitransformer.processes import in_processes, processors
from minitransformer.text.cleaning.config import CleaningConfig, SourceFiles, open_sources
from minitransformer.text.cleaning.duplicates import exact_duplicates, near_duplicates
from minitransformer.text.cleaning.examination import EXACT, KEPT, LEAK, NEAR, BlockOfFile, examine_block
from minitransformer.text.cleaning.formats import DocumentFile
from minitransformer.text.cleaning.held_out import HeldOut, leaked
from minitransformer.text.cleaning.journal import STREAMS, Journal
from minitransformer.text.folders import REMEDY, work_folder
from minitransformer.text.pairs import OnRead
from minitransformer.text.threads import progress_bar

SAMPLED_BYTES = 1 << 25
"""of a corpus, about, whose tokens are counted"""


@dataclass(frozen=True)
class Job:
    """What to clean, how, compared with which held-out files, and by how many processes."""

    sources: SourceFiles
    config: CleaningConfig
    held_out: SourceFiles | None
    workers: int
    progress: bool = True

    @cached_property
    def identity(self) -> str:
        """A hash of all that the verdicts depend on."""
        return self.config.identity(self.sources, *filter(None, [self.held_out]))

    @property
    def folder(self) -> Path:
        """The folder of the journal."""
        return work_folder() / "cleaning" / self.identity

    def check_unchanged(self) -> None:
        """Raises `UserError` if a file has changed since the job was made."""
        if Job(self.sources, self.config, self.held_out, 1).identity != self.identity:
            raise UserError("a file changed while it was read: try again when nothing writes to it")


def open_job(names: tuple[str, ...], config: CleaningConfig, workers: int | None = None, progress: bool = True) -> Job:
    """The job to clean what `names` name; raises `UserError` for files that cannot be read, or that are held out."""
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    sources = open_sources(names, config)
    held_out = open_sources(config.against, config) if config.against else None
    if held_out is not None:
        mine = {file.path.resolve() for file in sources.files}
        if both := [file.path for file in held_out.files if file.path.resolve() in mine]:
            raise UserError(f"{both[0]} is to be cleaned, and held out by --against: leave it out of one of them")
    return Job(sources, config, held_out, workers or processors(), progress)


@dataclass(frozen=True)
class Verdicts:
    """The verdict on each document, and for each duplicate the first document that it repeats."""

    journal: Journal
    files: int
    """number of files"""
    codes: npt.NDArray[np.uint8]
    """[documents]"""
    repeats: npt.NDArray[np.int64]
    """[duplicates] documents, sorted"""
    originals: npt.NDArray[np.int64]
    """[duplicates] what each of them repeats"""

    @cached_property
    def begins(self) -> list[int]:
        """The number of the first document of each file, over all files; then the number of documents."""
        sizes = [0] * self.files
        for file, count in self.journal.blocks:
            sizes[file] += count
        return list(accumulate(sizes, initial=0))

    def original_of(self, document: int) -> int | None:
        """The first document that this one repeats; None if it is no duplicate."""
        place = int(np.searchsorted(self.repeats, document))
        if place == len(self.repeats) or self.repeats[place] != document:
            return None
        return int(self.originals[place])

    def location(self, document: int) -> tuple[int, int]:
        """The number of the file of a document, and its number in the file, which is counted from 1."""
        file = bisect_right(self.begins, document) - 1
        return file, document - self.begins[file] + 1


def judge(job: Job) -> Verdicts:
    """The verdict on each document of `job`; the same command again goes on with a reading that was stopped.

    Raises `UserError` for a file that cannot be read, and `StorageError` where the journal cannot be written.
    """
    with writing(job.folder, REMEDY), locked(job.folder):
        journal = Journal.open(job.folder)
        if not journal.complete:
            _examine(job, journal)
        return _compared(job, journal)


def blocks_of(files: tuple[DocumentFile, ...], on_read: OnRead, *, whole: bool) -> Iterator[BlockOfFile]:
    """The blocks of all files, in order."""
    for number, file in enumerate(files):
        for content in file.blocks(on_read, whole=whole):
            yield BlockOfFile(number, file, content)


def _examine(job: Job, journal: Journal) -> None:
    if job.held_out is not None:
        HeldOut.write(job.folder, job.held_out.files, job.config.leak_words)
    sampled = min(1.0, SAMPLED_BYTES / job.sources.size)
    with progress_bar("examining", job.sources.size, job.progress) as bar:
        numbers: list[int] = []

        def remaining() -> Iterator[BlockOfFile]:
            blocks = blocks_of(job.sources.files, bar.update, whole=False)
            for block in islice(blocks, len(journal.blocks), None):
                numbers.append(block.number)
                yield block

        examine = partial(examine_block, job.config, job.folder, sampled)
        for count, examined in enumerate(in_processes(examine, remaining(), job.workers)):
            journal.add(numbers[count], examined)
    job.check_unchanged()
    journal.finish()


def _compared(job: Job, journal: Journal) -> Verdicts:
    codes: npt.NDArray[np.uint8] = journal.column("verdict")
    repeats, originals = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    if job.config.duplicates != "off":
        found = [(EXACT, partial(exact_duplicates, journal))]
        if job.config.duplicates == "near":
            found.append((NEAR, partial(near_duplicates, journal, alike=job.config.alike)))
        for code, duplicates in found:
            later, first = duplicates(is_kept=codes == KEPT)
            codes[later] = code
            repeats.append(later)
            originals.append(first)
    if job.held_out is not None:
        overlaps = np.concatenate([np.empty(0, STREAMS["overlaps"]), *journal.read("overlaps")])
        codes[leaked(overlaps, codes == KEPT)] = LEAK
    later, first = np.concatenate(repeats), np.concatenate(originals)
    order = np.argsort(later, kind="stable")
    return Verdicts(journal, len(job.sources.files), codes, later[order], first[order])
