"""From an experiment to its results: what was measured before is kept, the rest is measured on all processors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minitransformer import files
from minitransformer.amounts import duration
from minitransformer.errors import StorageError, UserError
from minitransformer.lab import pool
from minitransformer.lab.experiment import Experiment, Findings, Measurement, Settings, Task
from minitransformer.lab.store import REMEDY, ResultStore, task_key
from minitransformer.records import checked_fields, read_json

EXPERIMENT, RESULTS = "experiment.json", "results.jsonl"
LEFTOVERS = {".lock", ".partial"}
"""endings of files that a killed command may leave"""


class Progress:
    """Hears of tasks as they are done; this one keeps silent."""

    def begin(self, asked: int, done: int) -> None:
        """`asked` tasks are asked for, and `done` of them were measured before."""

    def measured(self, task: Task) -> None:
        """One more was measured."""

    def failed(self, failure: Failure) -> None:
        """One could not be measured."""

    def close(self) -> None:
        """Nothing more will be said."""


class Terminal(Progress):
    """A bar on a terminal; in a pipe, a line every few seconds."""

    SECONDS = 5.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def begin(self, asked: int, done: int) -> None:
        self.asked, self.done, self.left = asked, done, asked - done
        self.tried = 0
        self.started = self.said = time.monotonic()
        if done:
            print(f"{self.name:10} {done} of {asked} tasks were measured before", flush=True)
        if sys.stdout.isatty() and self.left:
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            self.bar = tqdm(
                total=asked, initial=done, desc=self.name, bar_format=layout, dynamic_ncols=True, file=sys.stdout
            )

    def measured(self, task: Task) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        self._advance()

    def failed(self, failure: Failure) -> None:
        text = f"{self.name:10} failed: {failure}"
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        self._advance()

    def _advance(self) -> None:
        self.tried, self.left, now = self.tried + 1, self.left - 1, time.monotonic()
        if self.bar is None and (not self.left or now - self.said > self.SECONDS):
            self.said = now
            seconds = (now - self.started) / self.tried * self.left
            print(f"{self.name:10} {self.done}/{self.asked} tasks, {duration(seconds)} left", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


SILENT = Progress()


@dataclass(frozen=True)
class Failure:
    """A task that could not be measured, and why."""

    task: Task
    reason: str

    def __str__(self) -> str:
        choices = ", ".join(f"{name} {value}" for name, value in self.task.items())
        return f"{self.reason}, at {choices}"


def run_tasks(
    tasks: Sequence[Task],
    measure: pool.Measure,
    store: ResultStore,
    processes: int | None = None,
    progress: Progress = SILENT,
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
        with closing(pool.outcomes(missing, measure, processes or pool.processors())) as outcomes:
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


@dataclass(frozen=True)
class Sweep:
    """The folder of an experiment: `experiment.json`, `results.jsonl`, and the report."""

    folder: Path
    experiment: Experiment
    store: ResultStore

    @classmethod
    def open(cls, folder: Path, experiment: Experiment) -> Sweep:
        """The sweep in `folder`, which is made if there is none.

        Raises `UserError` if the folder holds another experiment, other settings or anything else.
        """
        if (folder / EXPERIMENT).exists():
            _check_same(folder, experiment)
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: {REMEDY}")
        elif folder.exists() and any(path.suffix not in LEFTOVERS for path in folder.iterdir()):
            raise UserError(f"{folder} holds other things (it has no {EXPERIMENT}): {REMEDY}")
        return cls(folder, experiment, ResultStore(folder / RESULTS))

    @property
    def tasks(self) -> dict[str, Task]:
        """What is asked for, as far as the results tell by now, by key, each once."""
        asked: dict[str, Task] = {}
        tasks = self.experiment.tasks()
        while new := {task_key(task): task for task in tasks if task_key(task) not in asked}:
            asked |= new
            tasks = self.experiment.further_tasks(self.store.results(asked.values()))
        return asked

    @property
    def is_measured(self) -> bool:
        """Whether nothing is asked for that was not measured before."""
        return all(task in self.store for task in self.tasks.values())

    @property
    def records(self) -> list[dict[str, str]]:
        """The provenance of each command that measured here, the latest at the end."""
        return _read(self.folder)["provenance"] if (self.folder / EXPERIMENT).exists() else []

    def run(self, processes: int | None = None, progress: Progress = SILENT) -> list[Failure]:
        """Measure what is missing, as `run_tasks` does, and what is asked for once that is known."""
        if not self.is_measured:
            self._record()
        measure = partial(_measure, type(self.experiment), self.experiment.settings)
        asked: set[str] = set()
        failures: list[Failure] = []
        while new := {key: task for key, task in self.tasks.items() if key not in asked}:
            asked |= set(new)
            failures += run_tasks(list(new.values()), measure, self.store, processes, progress)
        return failures

    def _record(self) -> None:
        from minitransformer.runs import provenance  # late: each process imports this module, and that takes seconds

        record = {
            "experiment": self.experiment.name,
            "settings": asdict(self.experiment.settings),
            "provenance": [*self.records, provenance()],
        }
        with files.writing(self.folder / EXPERIMENT, REMEDY):
            files.write_text(self.folder / EXPERIMENT, json.dumps(record, indent=2) + "\n")

    def conclude(self) -> Findings:
        """What the results say; raises `UserError` if there are none."""
        results = self.store.results(self.tasks.values())
        if not results:
            raise UserError(f"{self.experiment.name} has no results: nothing can be concluded")
        return self.experiment.conclude(results)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / EXPERIMENT
    record = read_json(path, f"restore it, or {REMEDY}")
    try:
        Settings(**checked_fields(Settings, record["settings"], str(path)))
        return {"experiment": str(record["experiment"]), **record, "provenance": list(record["provenance"])}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is damaged ({error}): restore it, or {REMEDY}") from None


def _check_same(folder: Path, experiment: Experiment) -> None:
    record = _read(folder)
    if record["experiment"] != experiment.name:
        raise UserError(f"{folder} holds experiment {record['experiment']}, not {experiment.name}: {REMEDY}")
    recorded = asdict(Settings(**record["settings"]))
    for name, value in asdict(experiment.settings).items():
        if recorded[name] != value:
            raise UserError(f"{folder} holds {experiment.name} with {name} {recorded[name]}, not {value}: {REMEDY}")


@cache
def _experiment(kind: Callable[[Settings], Experiment], settings: Settings) -> Experiment:
    """One for each process, so that it may keep what it has read."""
    return kind(settings)


def _measure(kind: Callable[[Settings], Experiment], settings: Settings, task: Task) -> Measurement:
    return _experiment(kind, settings).measure(task)
