"""What a sweep measures: configurations made of a preset and combinations, rung by rung, and whether they compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minitransformer.analysis.search_space import Combination, Range, SweptSetting, Values, draws, grid, label, rungs
from minitransformer.analysis.trials import prepared_for
from minitransformer.analysis.verdicts import check_smallest_difference
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import SMALLEST_DIFFERENCE, Metric
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import count_parameters
from minitransformer.settings import flat, kinds, names_with, with_settings
from minitransformer.tasks.task import Task
from minitransformer.text.datasets import PreparedData
from minitransformer.training.config import (
    RunConfig,
    with_usual_vocabulary,
    with_vocabulary,
)
from minitransformer.training.loader import Loader

JUDGED_BY = "the last validation"


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


@contextmanager
def _naming(combination: Combination) -> Iterator[None]:
    """Adds to a `UserError` in which combination it came up."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} (in the combination {label(combination)})") from None


@dataclass(frozen=True)
class SweepPlan:
    """What is searched, and how. Raises `UserError` for what cannot be compared or shared out."""

    preset: str
    base: RunConfig
    """what all trials share"""
    settings: tuple[SweptSetting, ...]
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
        # Losses of another task or another text do not compare, and those of other tokens only in bits per byte.
        of_task, of_tokens = (names_with(RunConfig, about) for about in ("changes_task", "changes_tokens"))
        for name in self.varied:
            if name in of_task:
                raise UserError(f"{name} changes what is learned, and such losses do not compare: sweep something else")
            if name in of_tokens and not Metric.named(self.metric).across_tokenizers:
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

    def prepare(self) -> list[PreparedData]:
        """The data of all trials, each kind once. Raises `UserError` for data or combinations that cannot be used."""
        found: dict[Path, PreparedData] = {}
        for combination in self.combinations:
            config = self.config(combination, self.seeds[0])
            prepared = prepared_for(config)
            found.setdefault(prepared.folder, prepared)
            config = replace(config, model=with_vocabulary(config.model, prepared))
            with _naming(combination):
                loader = Loader.of_run(config, prepared)
            if self.metric == "bits_per_byte" and loader.validation_bytes is None:
                name = loader.objective.name
                raise UserError(f"objective {name!r} has no bits per byte: use --metric validation_loss")
        return list(found.values())

    @property
    def identity(self) -> dict[str, Any]:
        """What a folder of results is for. Without halving, trials, seeds and metrics may be added to it."""
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
