"""Hyper-parameter search: settings of a preset tried in run folders of their own, on all processors, resumable.

Grid search, random search (Bergstra and Bengio 2012, JMLR 13) and successive halving (Jamieson and Talwalkar 2016,
arXiv 1502.07943), in which a trial that goes on is resumed from its checkpoint. Optuna was considered: its samplers and
pruners decide by what happens to be finished, so a search on several processes is not repeatable, and resuming a trial
from its checkpoint, the folders and the paired statistics would be ours to write all the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from minitransformer import files
from minitransformer.analysis.trials import prepared_for, shared_machine, train_trial, trial_machine
from minitransformer.analysis.verdicts import check_smallest_difference, choice_text
from minitransformer.errors import StorageError, UserError
from minitransformer.lab.experiment import Measurement, Result, Task
from minitransformer.lab.runner import LEFTOVERS, RESULTS, SILENT, Failure, Progress, run_tasks
from minitransformer.lab.store import REMEDY, ResultStore, canonical, task_key
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import count_parameters
from minitransformer.records import read_json
from minitransformer.reporting.statistics import SMALLEST_DIFFERENCE, Interval, Ranking, mean_interval, ranking
from minitransformer.runs import provenance
from minitransformer.settings import flat, kinds, names_with, with_settings
from minitransformer.text.corpora import named
from minitransformer.training.config import (
    RunConfig,
    with_usual_vocabulary,
    with_vocabulary,
)
from minitransformer.training.machine import Resolved
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared

SWEEP, TRIALS = "sweep.json", "trials"
ATTEMPTS = 100
"""draws for each combination that is asked for, until it is believed that there are no more"""
LONGEST_NAME = 100
JUDGED_BY = "the last validation"
# Losses of another task or another text do not compare, and those of other tokens only in bits per byte.
TASK, TOKENS = names_with(RunConfig, "changes_task"), names_with(RunConfig, "changes_tokens")

Value: TypeAlias = bool | int | float | str | None
Combination: TypeAlias = dict[str, Value]
"""a value for each setting that is swept"""


@dataclass(frozen=True)
class Values:
    """A setting that takes each of some values."""

    name: str
    values: tuple[Value, ...]

    def draw(self, generator: np.random.Generator) -> Value:
        return self.values[generator.integers(len(self.values))]

    def __str__(self) -> str:
        return ", ".join(value_text(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """A setting that is drawn between two values, both included.

    Whole numbers are drawn evenly; others too, or evenly in their logarithm where the ends are positive and at least
    ten times apart, and rounded to three digits.
    """

    name: str
    low: float
    high: float

    @property
    def is_logarithmic(self) -> bool:
        return not isinstance(self.low, int) and 0 < 10 * self.low <= self.high

    def draw(self, generator: np.random.Generator) -> Value:
        if isinstance(self.low, int):
            return int(generator.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.is_logarithmic else (self.low, self.high)
        drawn = float(generator.uniform(low, high))
        rounded = float(f"{math.exp(drawn) if self.is_logarithmic else drawn:.3g}")
        return min(max(rounded, self.low), self.high)

    def __str__(self) -> str:
        return f"{value_text(self.low)} to {value_text(self.high)}{', logarithmic' * self.is_logarithmic}"


Setting: TypeAlias = Values | Range


def grid(settings: Sequence[Setting]) -> list[Combination]:
    """All combinations, the last setting varying fastest. Raises `UserError` for a range, which has no values."""
    for setting in settings:
        if isinstance(setting, Range):
            raise UserError(f"{setting.name} is a range, {setting}: draw from it with --random N, or list its values")
    names = [setting.name for setting in settings]
    values = [setting.values for setting in settings if isinstance(setting, Values)]
    return [dict(zip(names, row, strict=True)) for row in product(*values)]


def draws(settings: Sequence[Setting], count: int, seed: int) -> list[Combination]:
    """`count` different combinations, drawn independently; the first of them are the same for every `count`.

    Raises `UserError` if there are fewer.
    """
    generator = np.random.default_rng(seed)
    drawn: dict[str, Combination] = {}
    for _ in range(ATTEMPTS * count):
        combination = {setting.name: setting.draw(generator) for setting in settings}
        drawn.setdefault(canonical(combination), combination)
        if len(drawn) == count:
            return list(drawn.values())
    raise UserError(f"--random {count} finds {len(drawn)} different combinations only: ask for fewer, or widen --set")


def rungs(steps: int, count: int, factor: int, eval_every: int) -> list[int]:
    """After how many steps the best of `count` combinations go on, each time one in `factor`; `steps` are the last.

    All are multiples of the first, and the first of `eval_every` unless that is larger. Raises `UserError` for fewer
    combinations than `factor`, or too few steps to share.
    """
    if count < factor:
        raise UserError(f"--halving {factor} lets one combination in {factor} go on, and there are {count}: give more")
    number = 1
    while factor**number <= count:
        number += 1
    first = steps // factor ** (number - 1)
    if first < 1:
        raise UserError(f"{steps} steps are too few to halve {count} combinations by {factor}: raise --steps")
    if first > eval_every:
        first -= first % eval_every
    return [*(first * factor**rung for rung in range(number - 1)), steps]


def configured(base: RunConfig, combination: Mapping[str, Any]) -> RunConfig:
    """`base` with the values of `combination`; raises `UserError` as the configuration does."""
    config = with_settings(base, combination)
    config.check_trainable()
    return config


def flags(default: RunConfig, config: RunConfig) -> list[str]:
    """What `train.py` is told to make `config` of its `default`."""
    words, before, kind_of = [], flat(default), kinds(RunConfig)
    for name, value in flat(config).items():
        flag = name.replace("_", "-")
        if value == before.get(name, MISSING):
            continue
        if kind_of[name] is bool:  # one that may be None takes its value as a word
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def value_text(value: Value) -> str:
    """As a person would type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(combination: Combination) -> str:
    """The combination in words."""
    return ", ".join(choice_text(name, value_text(value)) for name, value in combination.items())


@contextmanager
def _naming(combination: Combination) -> Iterator[None]:
    """Adds to a `UserError` in which combination it came up."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (in the combination {label(combination)})") from None


@dataclass(frozen=True)
class Plan:
    """What is searched, and how. Raises `UserError` for what cannot be compared or shared out."""

    preset: str
    base: RunConfig
    """what all trials share"""
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...] = (0,)
    random: int | None = None
    """how many combinations are drawn; None tries all of them"""
    draw_seed: int = 0
    halving: int | None = None
    """one combination in this many goes on from rung to rung; None trains all of them to the end"""
    metric: str = "validation_loss"
    smallest_difference: float = SMALLEST_DIFFERENCE
    """below which no winner is named"""

    def __post_init__(self) -> None:
        if not self.settings:
            raise UserError("there is nothing to sweep: name settings and values, such as --set lr=1e-3,3e-3")
        for name, value, least in (("random", self.random, 1), ("halving", self.halving, 2)):
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}: it must be at least {least}")
        check_smallest_difference(self.smallest_difference)
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UserError(f"--seeds are {', '.join(map(str, self.seeds)) or 'none'}: give different ones")
        for name in self.varied:
            if name in TASK:
                raise UserError(f"{name} changes what is learned, and such losses do not compare: sweep something else")
            if name in TOKENS and self.metric == "validation_loss":
                raise UserError(f"losses do not compare where {name} differs: use --metric bits_per_byte")
            if name in ("steps", "eval_every") and self.halving is not None:
                raise UserError(f"--halving gives all combinations the same {name}: give one, with --{name}")

    @property
    def varied(self) -> list[str]:
        """The settings that have more than one value."""
        return [s.name for s in self.settings if isinstance(s, Range) or len(s.values) > 1]

    @cached_property
    def combinations(self) -> list[Combination]:
        """What is tried."""
        return draws(self.settings, self.random, self.draw_seed) if self.random is not None else grid(self.settings)

    @cached_property
    def rungs(self) -> list[int | None]:
        """After how many steps trials are compared; None is after all of theirs."""
        if self.halving is None:
            return [None]
        shared = self.shared.training
        return [*rungs(shared.steps, len(self.combinations), self.halving, shared.eval_every)]

    @property
    def shared(self) -> RunConfig:
        """`base` with the settings that have one value."""
        single = [s for s in self.settings if isinstance(s, Values) and len(s.values) == 1]
        return configured(self.base, {setting.name: setting.values[0] for setting in single})

    def config(self, combination: Combination, seed: int) -> RunConfig:
        """The configuration of a trial; halving wants a validation at each rung. Raises `UserError` as that does.

        What is drawn of the validation split would differ between trials, so all of it is read unless told otherwise.
        """
        config = configured(self.base, {**combination, "seed": seed})
        if config.training.validation_tokens is None:
            config = replace(config, training=replace(config.training, validation_tokens=0))
        if self.rungs[0] is None:
            return config
        eval_every = min(config.training.eval_every, self.rungs[0])
        return replace(config, training=replace(config.training, eval_every=eval_every))

    def task(self, combination: Combination, seed: int, rung: int | None) -> Task:
        """A trial until a rung."""
        until = self.config(combination, seed).training.steps if rung is None else rung
        return {**combination, "seed": seed, "until": until}

    def check(self) -> None:
        """Raises `UserError`, which names the combination, if one has no configuration or no model."""
        possible: set[ModelConfig] = set()
        assert self.rungs  # what cannot be shared out is no fault of a combination, and is said first
        for combination in self.combinations:
            with _naming(combination):
                config = self.config(combination, self.seeds[0])
                if not config.data.validates:
                    raise UserError("validation_fraction 0 leaves nothing to choose a winner by: keep some of the text")
                model = with_usual_vocabulary(config)
                if model not in possible:
                    count_parameters(model)
                    possible.add(model)

    def prepare(self) -> list[Prepared]:
        """The data of all trials, each kind once. Raises `UserError` for data or combinations that cannot be used."""
        found: dict[Path, Prepared] = {}
        for combination in self.combinations:
            config = self.config(combination, self.seeds[0])
            prepared = prepared_for(config)
            found.setdefault(prepared.folder, prepared)
            config = replace(config, model=with_vocabulary(config.model, prepared))
            with _naming(combination):
                objective = Objective.named(config.training.objective)(prepared, config)
            if self.metric == "bits_per_byte" and objective.validation_bytes is None:
                raise UserError(f"objective {objective.name!r} has no bits per byte: use --metric validation_loss")
        return list(found.values())

    @property
    def identity(self) -> dict[str, Any]:
        """What a folder of results is for. Without halving, trials, seeds and metrics may be added to it."""
        parts = self.base.to_json()
        named = {name: value for part in ("model", "data", "training") for name, value in parts[part].items()}
        names = ", ".join(setting.name for setting in self.settings)
        identity = {"preset": self.preset, "settings": names, "halving": self.halving, "judged by": JUDGED_BY, **named}
        if self.halving is not None:
            identity |= {"random": self.random, "draw_seed": self.draw_seed, "metric": self.metric}
            identity |= {f"values of {setting.name}": str(setting) for setting in self.settings}
            identity |= {"seeds": list(self.seeds)}
        return json.loads(json.dumps(identity))


@dataclass(frozen=True)
class Standing:
    """How a combination did until a rung: its metric for each seed, infinite where that has no finite one."""

    combination: Combination
    until: int
    values: tuple[float, ...]
    diverged: tuple[int, ...]
    """seeds whose training was not finite"""
    missing: tuple[int, ...]
    """seeds that were not measured"""

    @property
    def mean(self) -> float:
        """Over the seeds; infinite if one is."""
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> Interval | None:
        """Over the seeds; None where one of them has no finite value."""
        return mean_interval(self.values) if math.isfinite(self.mean) else None


@dataclass(frozen=True)
class Search:
    """The folder of a sweep: `sweep.json`, `results.jsonl`, the run folders of `trials/`, and the report."""

    folder: Path
    plan: Plan
    store: ResultStore

    @classmethod
    def open(cls, folder: Path, plan: Plan) -> Search:
        """The sweep in `folder`, which is made if there is none.

        Raises `UserError` if the folder holds another sweep or anything else.
        """
        if (folder / SWEEP).exists():
            _check_same(folder, plan)
        elif folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: {REMEDY}")
        elif folder.exists() and any(path.suffix not in LEFTOVERS for path in folder.iterdir()):
            raise UserError(f"{folder} holds other things (it has no {SWEEP}): {REMEDY}")
        return cls(folder, plan, ResultStore(folder / RESULTS))

    @property
    def records(self) -> list[dict[str, str]]:
        """The provenance of each command that measured here, the latest at the end."""
        return _read(self.folder)["provenance"] if (self.folder / SWEEP).exists() else []

    @cached_property
    def machine(self) -> Resolved:
        """What "auto" means in every trial: resolved once, when the sweep begins. Raises `UserError` if it is gone."""
        configs = [self.plan.config(combination, self.plan.seeds[0]) for combination in self.plan.combinations]
        kept = _read(self.folder)["machine"] if (self.folder / SWEEP).exists() else None
        return shared_machine(configs, kept, self.plan.varied)

    def run(
        self, processes: int | None = None, progress: Callable[[str], Progress] = lambda name: SILENT
    ) -> list[Failure]:
        """Measure what is missing, rung by rung, and return the trials that failed, which count as the last.

        `plan.prepare` comes before. Raises `UserError` where the data is no longer that of the results.
        """
        self._check_text()
        if any(task not in self.store for task in self.tasks()):
            self._record()
        failures = []
        measure = partial(_measure, self.folder, self.plan, self.machine)
        for number, rung in enumerate(self.plan.rungs, start=1):
            tasks = [task for combination in self._entrants(number) for task in self._tasks(combination, rung)]
            name = "trials" if rung is None else f"rung {number}/{len(self.plan.rungs)}"
            failures += run_tasks(tasks, measure, self.store, processes, progress(name))
        return failures

    def standings(self, number: int) -> list[Standing]:
        """Of rung `number`, counted from 1, from the lowest mean to the highest; those without one are last."""
        rung = self.plan.rungs[number - 1]
        unordered = [self._standing(combination, rung) for combination in self._entrants(number)]
        return sorted(unordered, key=lambda standing: standing.mean)

    def all_standings(self) -> list[Standing]:
        """Each combination once, at the last rung that it came to; who came furthest is first."""
        found: dict[str, Standing] = {}
        for number in range(len(self.plan.rungs), 0, -1):
            for standing in self.standings(number):
                found.setdefault(canonical(standing.combination), standing)
        return list(found.values())

    def tasks(self) -> list[Task]:
        """What is asked for, in the order of rungs, combinations and seeds; of later rungs, by what is known so far."""
        rungs = enumerate(self.plan.rungs, start=1)
        return [
            task for number, rung in rungs for choice in self._entrants(number) for task in self._tasks(choice, rung)
        ]

    def results(self) -> list[Result]:
        """What was measured of `tasks`."""
        return self.store.results(self.tasks())

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
        known = {seed: measured[self.plan.metric] for seed, measured in results.items() if measured["finite"]}
        seeds = self.plan.seeds
        return Standing(
            combination,
            until=tasks[0]["until"],
            values=tuple(known.get(seed, math.inf) for seed in seeds),
            diverged=tuple(seed for seed in seeds if seed in results and seed not in known),
            missing=tuple(seed for seed in seeds if seed not in results),
        )

    def _check_text(self) -> None:
        for result in self.results():
            config = self.plan.config(_combination(result.task), result.task["seed"])
            if result.measured["text"] != prepared_for(config).folder.name:
                raise UserError(f"{named(config.data.data)} is not the text that {self.folder} began with: {REMEDY}")

    def _record(self) -> None:
        record = {
            "identity": self.plan.identity,
            "machine": self.machine.to_json(),
            "provenance": [*self.records, provenance()],
        }
        with files.writing(self.folder / SWEEP, REMEDY):
            files.write_text(self.folder / SWEEP, json.dumps(record, indent=2) + "\n")


def standings_ranking(standings: Sequence[Standing], smallest: float = SMALLEST_DIFFERENCE) -> Ranking:
    """What the seeds allow one to say of standings at one rung."""
    return ranking({label(standing.combination): standing.values for standing in standings}, smallest=smallest)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SWEEP
    record = read_json(path, f"restore it, or {REMEDY}")
    try:
        machine = Resolved.from_json(record.get("machine"), str(path))
        return {"identity": dict(record["identity"]), "machine": machine, "provenance": list(record["provenance"])}
    except (ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{path} is damaged ({error}): restore it, or {REMEDY}") from None


def _check_same(folder: Path, plan: Plan) -> None:
    old, new = _read(folder)["identity"], plan.identity
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            raise UserError(f"{folder} holds a sweep with {name} {old.get(name)}, not {new.get(name)}: {REMEDY}")


def _combination(task: Task) -> Combination:
    return {name: value for name, value in task.items() if name not in ("seed", "until")}


def trial_name(combination: Combination, seed: int) -> str:
    """The name of the folder of a trial, which says its settings if there is room for them."""
    words = [f"{name}-{value_text(value)}" for name, value in {**combination, "seed": seed}.items()]
    name = re.sub(r"[^\w.+-]+", "-", "-".join(words))
    return name if len(name) <= LONGEST_NAME else f"{task_key(combination)}-seed-{seed}"


def _measure(folder: Path, plan: Plan, shared: Resolved, task: Task) -> Measurement:
    combination, seed = _combination(task), task["seed"]
    name, config = trial_name(combination, seed), plan.config(combination, seed)
    machine = trial_machine(config, shared, plan.varied)
    measured = train_trial(folder / TRIALS / name, config, task["until"], machine)
    return {**measured, "run": f"{TRIALS}/{name}"}


def best_seed(standing: Standing, seeds: Iterable[int]) -> int:
    """The seed that did best."""
    return min(zip(standing.values, seeds, strict=True))[1]
