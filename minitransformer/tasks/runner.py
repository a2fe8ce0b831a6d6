"""Run tasks in parallel, and keep their results in a folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.processes import processors
from minitransformer.records import read_json
from minitransformer.tasks import pool
from minitransformer.tasks.progress import SILENT, TaskProgress
from minitransformer.tasks.store import REMEDY, ResultStore
from minitransformer.tasks.task import Failure, MeasureTask, Result, Task, task_key

RESULTS = "results.jsonl"
LEFTOVERS = {".lock", ".partial"}
"""suffixes of temporary files that a killed command may leave"""


def run_tasks(
    tasks: Sequence[Task],
    measure: MeasureTask,
    store: ResultStore,
    processes: int | None = None,
    progress: TaskProgress = SILENT,
) -> list[Failure]:
    """Measure the `tasks` that are missing in `store`, and store each result immediately.

    `measure` runs in `processes` processes, by default one per CPU core, and must be picklable.
    Returns the tasks that raised an exception, which are retried in the next call. Raises `UserError`
    as soon as a task does.
    """
    unique = {task_key(task): task for task in tasks}
    missing = [task for task in unique.values() if task not in store]
    failures = []
    progress.begin(len(unique), len(unique) - len(missing))
    try:
        with closing(pool.outcomes(missing, measure, processes or processors())) as outcomes:
            for outcome in outcomes:
                if outcome.mendable:
                    raise UserError(outcome.failure)
                if outcome.measured is None:
                    failures.append(Failure(outcome.task, outcome.failure))
                    progress.failed(failures[-1])
                else:
                    store.add(outcome.task, outcome.measured, outcome.seconds)
                    progress.measured(outcome.task)
    finally:
        progress.close()
    return failures


class TaskFolder(ABC):
    """A folder with a record of its purpose, `results.jsonl` and a report, in which an interrupted command continues.

    Raises `UserError` if the folder has another purpose or content; it is created with the first result.
    """

    RECORD: ClassVar[str]
    """name of the JSON file with the folder's purpose and the commands that measured"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / self.RECORD).exists():
            self.check_same(self.read_record())
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: {REMEDY}")
        elif folder.exists() and any(path.suffix not in LEFTOVERS for path in folder.iterdir()):
            raise UserError(f"{folder} has other contents (it has no {self.RECORD}): {REMEDY}")
        self.store = ResultStore(folder / RESULTS)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The purpose of the folder, as JSON values."""

    @abstractmethod
    def check_record(self, record: Mapping[str, Any], path: Path) -> None:
        """Raises `UserError`, `ValueError`, `LookupError`, `TypeError` or `AttributeError` for an invalid record."""

    @abstractmethod
    def check_same(self, record: Mapping[str, Any]) -> None:
        """Raises `UserError` if the folder's `record` has another purpose."""

    @abstractmethod
    def asked(self) -> list[Task]:
        """The tasks known so far from the results, each once."""

    @property
    def is_measured(self) -> bool:
        """Whether every task is measured."""
        return all(task in self.store for task in self.asked())

    def results(self) -> list[Result]:
        """The results of all tasks that are measured."""
        return self.store.results(self.asked())

    @property
    def records(self) -> list[dict[str, str]]:
        """The provenance of each command that measured here, oldest first."""
        return self.read_record()["provenance"] if (self.folder / self.RECORD).exists() else []

    def read_record(self) -> dict[str, Any]:
        """The folder's record; raises `StorageError` if it is damaged."""
        path = self.folder / self.RECORD
        record = read_json(path, f"restore it, or {REMEDY}")
        try:
            self.check_record(record, path)
            return {**record, "provenance": list(record["provenance"])}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} is damaged ({error}): restore it, or {REMEDY}") from None

    def write_record(self) -> None:
        """Write the folder's record, with this command's provenance."""
        from minitransformer.runs import provenance  # late: each process imports this module, and runs takes seconds

        record = {**self.describe(), "provenance": [*self.records, provenance()]}
        with files.writing(self.folder / self.RECORD, REMEDY):
            files.write_text(self.folder / self.RECORD, json.dumps(record, indent=2) + "\n")
