"""The plan of a sweep: configurations from a preset and combinations, rungs, and comparability."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitransformer.analysis.search_space import Combination, Range, SweptSetting, Values, draws, grid, label, rungs
from minitransformer.analysis.trials import prepared_for
from minitransformer.analysis.verdicts import check_smallest_difference
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import Metric
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model, count_parameters
from minitransformer.runs.begin import check_has_base
from minitransformer.settings import flat, kinds, names_with, with_settings
from minitransformer.tasks.task import Task
from minitransformer.text.datasets import PreparedData
from minitransformer.training.config import (
    RunConfig,
    with_usual_vocabulary,
    with_vocabulary,
)
from minitransformer.training.loader import Loader
from minitransformer.training.precision import Precision
from minitransformer.training.validation import Subset, validate

JUDGED_BY = "the last validation"


def configured(base: RunConfig, combination: Mapping[str, Any]) -> RunConfig:
    """`base` with the values of `combination`; raises `UserError` as the configuration does."""
    config = with_settings(base, combination)
    config.check_trainable()
    return config


def flags(default: RunConfig, config: RunConfig) -> list[str]:
    """The flags of `train.py` that turn `default` into `config`."""
    words, before, kind_of = [], flat(default), kinds(RunConfig)
    for name, value in flat(config).items():
        flag = name.replace("_", "-")
        if value == before.get(name, MISSING):
            continue
        if kind_of[name] is bool:  # an optional bool takes its value as a word
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


@contextmanager
def _naming(combination: Combination) -> Iterator[None]:
    """Add the combination to a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (in the combination {label(combination)})") from None


@dataclass(frozen=True)
class SweepPlan:
    """What is searched, and how. Raises `UserError` for incomparable trials or an impossible plan."""

    preset: str
    base: RunConfig
    """base configuration of all trials"""
    settings: tuple[SweptSetting, ...]
    seeds: tuple[int, ...] = (0,)
    random: int | None = None
    """number of drawn combinations; None is the full grid"""
    draw_seed: int = 0
    halving: int | None = None
    """factor of successive halving; None trains all combinations to the end"""
    metric: str = "validation_loss"
    """a metric with a direction"""
    smallest_difference: float | None = None
    """smallest difference that names a winner; None is that of the metric"""

    def __post_init__(self) -> None:
        if not self.settings:
            raise UserError("there is nothing to sweep: give settings and values, such as --set lr=1e-3,3e-3")
        for name, value, least in (("random", self.random, 1), ("halving", self.halving, 2)):
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}: it must be at least {least}")
        check_smallest_difference(self.smallest_difference)
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UserError(f"--seeds are {', '.join(map(str, self.seeds)) or 'none'}: give different ones")
        # Losses on different tasks or texts are not comparable, and with different tokenizers only in bits per byte.
        of_task, of_tokens = (names_with(RunConfig, about) for about in ("changes_task", "changes_tokens"))
        for name in self.varied:
            if name in of_task:
                raise UserError(f"{name} changes the task, so that losses are not comparable: sweep another setting")
            if name in of_tokens and not self.judge.across_tokenizers:
                raise UserError(f"losses are not comparable if {name} differs: use --metric bits_per_byte")
            if name in ("steps", "eval_every") and self.halving is not None:
                raise UserError(f"--halving needs the same {name} for all combinations: give one, with --{name}")

    @property
    def judge(self) -> type[Metric]:
        """The metric that combinations are compared by."""
        return Metric.named(self.metric)

    @property
    def sign(self) -> int:
        """1 where a lower metric is better, −1 where a higher one is."""
        return 1 if self.judge.lower_is_better else -1

    @property
    def varied(self) -> list[str]:
        """The settings that have more than one value."""
        return [s.name for s in self.settings if isinstance(s, Range) or len(s.values) > 1]

    @cached_property
    def combinations(self) -> list[Combination]:
        """The combinations to try."""
        return draws(self.settings, self.random, self.draw_seed) if self.random is not None else grid(self.settings)

    @cached_property
    def rungs(self) -> list[int | None]:
        """The steps at which trials are compared; None is at their end."""
        if self.halving is None:
            return [None]
        shared = self.shared.training
        return [*rungs(shared.steps, len(self.combinations), self.halving, shared.eval_every)]

    @property
    def shared(self) -> RunConfig:
        """`base` with the settings that have a single value."""
        single = [s for s in self.settings if isinstance(s, Values) and len(s.values) == 1]
        return configured(self.base, {setting.name: setting.values[0] for setting in single})

    def config(self, combination: Combination, seed: int) -> RunConfig:
        """The configuration of a trial, with a validation at each rung. Raises `UserError` if it is invalid.

        The validation subset would differ between trials, so the whole split is read by default.
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
        """Raises `UserError` with the combination if its configuration or model is invalid."""
        possible: set[ModelConfig] = set()
        assert self.rungs  # an impossible halving is not the fault of a combination, and is reported first
        for combination in self.combinations:
            with _naming(combination):
                config = self.config(combination, self.seeds[0])
                if not config.data.validates:
                    raise UserError("validation_fraction 0 leaves no validation data to choose a winner by: raise it")
                model = with_usual_vocabulary(config)
                check_has_base(config)
                if model not in possible:
                    count_parameters(model)
                    possible.add(model)

    def prepare(self) -> list[PreparedData]:
        """The distinct datasets of all trials. Raises `UserError` for unusable data or combinations."""
        found: dict[Path, PreparedData] = {}
        for combination in self.combinations:
            config = self.config(combination, self.seeds[0])
            prepared = prepared_for(config)
            found.setdefault(prepared.folder, prepared)
            config = replace(config, model=with_vocabulary(config.model, prepared))
            with _naming(combination):
                loader = Loader.of_run(config, prepared)
        self._check_metric(config.model, loader)
        return list(found.values())

    def _check_metric(self, config: ModelConfig, loader: Loader) -> None:
        """Raises `UserError` for a metric that validations with this objective lack, found on a batch of one."""
        if self.metric == "validation_loss" or not self.judge.in_words:
            return
        one_batch = Subset([0], 0, loader.validation_bytes)
        precision = Precision.named("fp32")(torch.device("cpu"))
        if validate(build_model(config), loader, precision, one_batch, whole=False).values[self.metric] is None:
            name = loader.objective.name
            raise UserError(f"objective {name!r} has no {self.judge.title}: use --metric validation_loss")

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies a folder of results. Without halving, trials, seeds and metrics may be added."""
        names = ", ".join(setting.name for setting in self.settings)
        identity: dict[str, Any] = {
            "preset": self.preset,
            "settings": names,
            "halving": self.halving,
            "judged by": JUDGED_BY,
        }
        identity |= flat(self.base)
        if self.halving is not None:
            identity |= {"random": self.random, "draw_seed": self.draw_seed, "metric": self.metric}
            identity |= {f"values of {setting.name}": str(setting) for setting in self.settings}
            identity |= {"seeds": list(self.seeds)}
        return json.loads(json.dumps(identity))
