"""The run's folder, and room on disk for checkpoints and prepared data."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from minitransformer.amounts import size
from minitransformer.errors import StorageError
from minitransformer.files import existing, writing
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck
from minitransformer.preflight.data_checks import cache_size
from minitransformer.runs import REMEDY, check_free, only_writer
from minitransformer.text.folders import REMEDY as OTHER_CACHE
from minitransformer.text.folders import work_folder
from minitransformer.training.checkpoint import check_room


class FolderCheck(PreflightCheck, name="folder"):
    """Whether the run's folder is free, and can be written."""

    def find(self, candidate: Candidate) -> Finding:
        folder = candidate.folder
        if candidate.resumed is not None:
            with only_writer(folder):
                return Finding("ok", f"{folder} can be written, and no other process trains it")
        if candidate.out is not None:
            check_free(folder)
        _check_writable(existing(folder), REMEDY)
        return Finding("ok", f"{folder} can be written")


class CheckpointsCheck(PreflightCheck, name="checkpoints"):
    """Whether there is room for the checkpoints."""

    def find(self, candidate: Candidate) -> Finding:
        folder, config = candidate.folder, candidate.whole
        needed, free = check_room(folder, config)
        figures = {"bytes": needed, "free_bytes": free}
        return Finding("ok", f"{size(needed)} of {size(free)} free on disk", figures=figures)


class CacheCheck(PreflightCheck, name="cache"):
    """Whether prepared data has room, and can be written."""

    def find(self, candidate: Candidate) -> Finding:
        folder, needed = existing(work_folder()), cache_size(candidate)
        free = shutil.disk_usage(folder).free
        _check_writable(folder, OTHER_CACHE)
        if needed > free:
            raise StorageError(
                f"prepared data needs {size(needed)} and {folder} has {size(free)} free: free some, or {OTHER_CACHE}"
            )
        what = "the data is prepared" if candidate.data.prepared else f"{size(needed)} of {size(free)} free on disk"
        return Finding("ok", what, figures={"bytes": needed, "free_bytes": free, "folder": str(work_folder())})


def _check_writable(folder: Path, remedy: str) -> None:
    with writing(folder, remedy), tempfile.TemporaryFile(dir=folder):
        pass
