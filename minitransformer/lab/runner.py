"""Run an experiment in a folder of results, in which an interrupted command continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.lab.experiment import Experiment, ExperimentSettings, Findings
from minitransformer.records import checked_fields
from minitransformer.tasks.progress import SILENT, TaskProgress
from minitransformer.tasks.runner import TaskFolder, run_tasks
from minitransformer.tasks.store import REMEDY
from minitransformer.tasks.task import Failure, Measurement, Task, task_key


class ExperimentFolder(TaskFolder):
    """The folder of an experiment: `experiment.json`, `results.jsonl`, and the report.

    Raises `UserError` if the folder has another experiment, other settings or other contents.
    """

    RECORD = "experiment.json"

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.experiment = experiment
        super().__init__(folder)

    def describe(self) -> dict[str, Any]:
        return {"experiment": self.experiment.name, "settings": asdict(self.experiment.settings)}

    def check_record(self, record: Mapping[str, Any], path: Path) -> None:
        ExperimentSettings(**checked_fields(ExperimentSettings, record["settings"], str(path)))
        if not isinstance(record["experiment"], str):
            raise TypeError("the experiment has no name")

    def check_same(self, record: Mapping[str, Any]) -> None:
        name, kept = self.experiment.name, asdict(ExperimentSettings(**record["settings"]))
        if record["experiment"] != name:
            raise UserError(f"{self.folder} has experiment {record['experiment']}, not {name}: {REMEDY}")
        for setting, value in asdict(self.experiment.settings).items():
            if kept[setting] != value:
                raise UserError(f"{self.folder} has {name} with {setting} {kept[setting]}, not {value}: {REMEDY}")

    def asked(self) -> list[Task]:
        asked: dict[str, Task] = {}
        tasks = self.experiment.tasks()
        while new := {task_key(task): task for task in tasks if task_key(task) not in asked}:
            asked |= new
            tasks = self.experiment.further_tasks(self.store.results(asked.values()))
        return list(asked.values())

    def run(self, processes: int | None = None, progress: TaskProgress = SILENT) -> list[Failure]:
        """Measure missing tasks by `run_tasks`, and then further tasks until there are none."""
        if not self.is_measured:
            self.write_record()
        measure = partial(_measure, type(self.experiment), self.experiment.settings)
        tried: set[str] = set()
        failures: list[Failure] = []
        while new := [task for task in self.asked() if task_key(task) not in tried]:
            tried |= set(map(task_key, new))
            failures += run_tasks(new, measure, self.store, processes, progress)
        return failures

    def conclude(self) -> Findings:
        """The findings; raises `UserError` without results."""
        results = self.results()
        if not results:
            raise UserError(f"{self.experiment.name} has no results yet: run it first")
        return self.experiment.conclude(results)


@cache
def _experiment(kind: Callable[[ExperimentSettings], Experiment], settings: ExperimentSettings) -> Experiment:
    """The experiment, created once per process, so that it may cache its data."""
    return kind(settings)


def _measure(kind: Callable[[ExperimentSettings], Experiment], settings: ExperimentSettings, task: Task) -> Measurement:
    return _experiment(kind, settings).measure(task)
