"""Hyper-parameter search over a preset: trials in separate run folders, in parallel, resumable.

A trial that advances is resumed from its checkpoint. Optuna was considered: its samplers and pruners decide by what
happens to be finished, so a parallel search is not reproducible, and resuming a trial from its checkpoint,
the folders and the paired statistics would have to be written anyway.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from minitransformer.analysis.search_space import Combination, label, value_text
from minitransformer.analysis.sweep_plan import SweepPlan
from minitransformer.analysis.trials import prepared_for, shared_machine, train_trial, trial_machine
from minitransformer.errors import UserError
from minitransformer.reporting.statistics import Interval, Ranking, mean_interval, ranking
from minitransformer.tasks.progress import SILENT, TaskProgress
from minitransformer.tasks.runner import TaskFolder, run_tasks
from minitransformer.tasks.store import REMEDY
from minitransformer.tasks.task import Failure, Measurement, Task, canonical, task_key
from minitransformer.text.corpora import named
from minitransformer.training.machine import Resolved

TRIALS = "trials"
LONGEST_NAME = 100


@dataclass(frozen=True)
class Standing:
    """The result of a combination at a rung: its metric for each seed, infinite where it is not finite."""

    combination: Combination
    until: int
    values: tuple[float, ...]
    diverged: tuple[int, ...]
    """seeds that diverged"""
    missing: tuple[int, ...]
    """seeds that were not measured, or without the metric"""

    @property
    def mean(self) -> float:
        """The mean over seeds; infinite if one is."""
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> Interval | None:
        """The confidence interval over seeds; None if a value is not finite."""
        return mean_interval(self.values) if math.isfinite(self.mean) else None


class SweepFolder(TaskFolder):
    """The folder of a sweep: `sweep.json`, `results.jsonl`, the run folders of `trials/`, and the report.

    Raises `UserError` if the folder has another sweep or other contents.
    """

    RECORD = "sweep.json"

    def __init__(self, folder: Path, plan: SweepPlan) -> None:
        self.plan = plan
        super().__init__(folder)

    def describe(self) -> dict[str, Any]:
        return {"identity": self.plan.identity, "machine": self.machine.to_json()}

    def check_record(self, record: Mapping[str, Any], path: Path) -> None:
        if not isinstance(record["identity"], dict):
            raise TypeError("its identity is no JSON object")
        Resolved.from_json(record.get("machine"), str(path))

    def check_same(self, record: Mapping[str, Any]) -> None:
        old, new = record["identity"], self.plan.identity
        for name, value in new.items():
            if old.get(name) != value:
                raise UserError(f"{self.folder} has a sweep with {name} {old.get(name)}, not {value}: {REMEDY}")

    @cached_property
    def machine(self) -> Resolved:
        """The machine of every trial, resolved when the sweep starts. Raises `UserError` if it is unavailable."""
        configs = [self.plan.config(combination, self.plan.seeds[0]) for combination in self.plan.combinations]
        kept = None
        if (self.folder / self.RECORD).exists():
            kept = Resolved.from_json(self.read_record().get("machine"), str(self.folder / self.RECORD))
        return shared_machine(configs, kept, self.plan.varied)

    def run(
        self, processes: int | None = None, progress: Callable[[str], TaskProgress] = lambda name: SILENT
    ) -> list[Failure]:
        """Run the missing trials, rung by rung; returns the failed trials, which rank last.

        Call `plan.prepare` first. Raises `UserError` if the data has changed since the results.
        """
        self._check_results()
        if not self.is_measured:
            self.write_record()
        failures = []
        measure = partial(_measure, self.folder, self.plan, self.machine)
        for number, rung in enumerate(self.plan.rungs, start=1):
            tasks = [task for combination in self._entrants(number) for task in self._tasks(combination, rung)]
            name = "trials" if rung is None else f"rung {number}/{len(self.plan.rungs)}"
            failures += run_tasks(tasks, measure, self.store, processes, progress(name))
        return failures

    def standings(self, number: int) -> list[Standing]:
        """The standings at rung `number`, counted from 1, the best mean first; those without a mean are last."""
        rung = self.plan.rungs[number - 1]
        unordered = [self._standing(combination, rung) for combination in self._entrants(number)]
        return sorted(unordered, key=lambda standing: self.plan.sign * standing.mean)

    def all_standings(self) -> list[Standing]:
        """Each combination at the last rung that it reached, furthest first."""
        found: dict[str, Standing] = {}
        for number in range(len(self.plan.rungs), 0, -1):
            for standing in self.standings(number):
                found.setdefault(canonical(standing.combination), standing)
        return list(found.values())

    def asked(self) -> list[Task]:
        # In the order of rungs, combinations and seeds.
        rungs = enumerate(self.plan.rungs, start=1)
        return [
            task for number, rung in rungs for choice in self._entrants(number) for task in self._tasks(choice, rung)
        ]

    def path(self, combination: Combination, seed: int) -> Path:
        """The run folder of a trial."""
        return self.folder / TRIALS / trial_name(combination, seed)

    def _entrants(self, number: int) -> list[Combination]:
        if number == 1:
            return self.plan.combinations
        assert self.plan.halving is not None
        before = self.standings(number - 1)
        return [standing.combination for standing in before[: max(1, len(before) // self.plan.halving)]]

    def _tasks(self, combination: Combination, rung: int | None) -> list[Task]:
        return [self.plan.task(combination, seed, rung) for seed in self.plan.seeds]

    def _standing(self, combination: Combination, rung: int | None) -> Standing:
        tasks = self._tasks(combination, rung)
        results = {result.task["seed"]: result.measured for result in self.store.results(tasks)}
        diverged = tuple(seed for seed, measured in results.items() if not measured["finite"])
        known = {seed: measured[self.plan.metric] for seed, measured in results.items() if seed not in diverged}
        known = {seed: value for seed, value in known.items() if value is not None}
        seeds = self.plan.seeds
        return Standing(
            combination,
            until=tasks[0]["until"],
            values=tuple(known.get(seed, self.plan.sign * math.inf) for seed in seeds),
            diverged=diverged,
            missing=tuple(seed for seed in seeds if seed not in known and seed not in diverged),
        )

    def _check_results(self) -> None:
        for result in self.results():
            if self.plan.metric not in result.measured:
                raise UserError(f"{self.folder} has results without {self.plan.metric}: {REMEDY}")
            config = self.plan.config(_combination(result.task), result.task["seed"])
            if result.measured["text"] != prepared_for(config).folder.name:
                raise UserError(f"{named(config.data.data)} is not the text that {self.folder} started with: {REMEDY}")


def standings_ranking(standings: Sequence[Standing], *, lower_is_better: bool = True, smallest: float) -> Ranking:
    """The ranking of standings at one rung."""
    values = {label(standing.combination): standing.values for standing in standings}
    return ranking(values, lower_is_better=lower_is_better, smallest=smallest)


def _combination(task: Task) -> Combination:
    return {name: value for name, value in task.items() if name not in ("seed", "until")}


def trial_name(combination: Combination, seed: int) -> str:
    """The folder name of a trial, with its settings if they fit."""
    words = [f"{name}-{value_text(value)}" for name, value in {**combination, "seed": seed}.items()]
    name = re.sub(r"[^\w.+-]+", "-", "-".join(words))
    return name if len(name) <= LONGEST_NAME else f"{task_key(combination)}-seed-{seed}"


def _measure(folder: Path, plan: SweepPlan, shared: Resolved, task: Task) -> Measurement:
    combination, seed = _combination(task), task["seed"]
    name, config = trial_name(combination, seed), plan.config(combination, seed)
    machine = trial_machine(config, shared, plan.varied)
    measured = train_trial(folder / TRIALS / name, config, task["until"], machine, metrics=[plan.metric])
    return {**measured, "run": f"{TRIALS}/{name}"}
