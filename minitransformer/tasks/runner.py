"""From tasks to their results: what was measured before is kept, the rest is measured on all processors."""

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
"""endings of files that a killed command may leave"""


def run_tasks(
    tasks: Sequence[Task],
    measure: MeasureTask,
    store: ResultStore,
    processes: int | None = None,
    progress: TaskProgress = SILENT,
) -> list[Failure]:
    """Measure those of `tasks` that `store` lacks, and keep each result as soon as it is there.

    `measure` runs in `processes` processes, by default one for each processor, and must be picklable by reference.
    Returns the tasks that raised an exception, which are tried again when they are asked for again. Raises `UserError`
    as soon as a task raises one.
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
    """A folder of results, in which a command that was stopped goes on: what it is for, `results.jsonl`, a report.

    Raises `UserError` if the folder is for something else or holds other things; it is made when there is a result.
    """

    RECORD: ClassVar[str]
    """name of the JSON file that says what the folder is for, and by which commands it was measured"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / self.RECORD).exists():
            self.check_same(self.read_record())
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: {REMEDY}")
        elif folder.exists() and any(path.suffix not in LEFTOVERS for path in folder.iterdir()):
            raise UserError(f"{folder} holds other things (it has no {self.RECORD}): {REMEDY}")
        self.store = ResultStore(folder / RESULTS)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the folder is for, in values that JSON has."""

    @abstractmethod
    def check_record(self, record: Mapping[str, Any], path: Path) -> None:
        """Raises `UserError`, `ValueError`, `LookupError`, `TypeError` or `AttributeError` if the record in `path` is
        none of this kind."""

    @abstractmethod
    def check_same(self, record: Mapping[str, Any]) -> None:
        """Raises `UserError` if the folder's `record` is that of something else."""

    @abstractmethod
    def asked(self) -> list[Task]:
        """What is to be measured, as far as the results tell by now, each task once."""

    @property
    def is_measured(self) -> bool:
        """Whether nothing is asked for that was not measured before."""
        return all(task in self.store for task in self.asked())

    def results(self) -> list[Result]:
        """What was measured of all that is asked for."""
        return self.store.results(self.asked())

    @property
    def records(self) -> list[dict[str, str]]:
        """The provenance of each command that measured here, the latest at the end."""
        return self.read_record()["provenance"] if (self.folder / self.RECORD).exists() else []

    def read_record(self) -> dict[str, Any]:
        """What the folder says that it is for; raises `StorageError` if that is damaged."""
        path = self.folder / self.RECORD
        record = read_json(path, f"restore it, or {REMEDY}")
        try:
            self.check_record(record, path)
            return {**record, "provenance": list(record["provenance"])}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} is damaged ({error}): restore it, or {REMEDY}") from None

    def write_record(self) -> None:
        """Write down what the folder is for, and that this command measures here."""
        from minitransformer.runs import provenance  # late: each process imports this module, and that takes seconds

        record = {**self.describe(), "provenance": [*self.records, provenance()]}
        with files.writing(self.folder / self.RECORD, REMEDY):
            files.write_text(self.folder / self.RECORD, json.dumps(record, indent=2) + "\n")
