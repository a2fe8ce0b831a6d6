"""Groups of runs that differ only in their seeds, and the settings that distinguish groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

import numpy as np

from minitransformer.analysis.history import Abscissa, History
from minitransformer.analysis.known_settings import defaults_of_others, settings_of_text, settings_with
from minitransformer.analysis.verdicts import choice_text, is_number
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.statistics import Interval, mean_interval

T = TypeVar("T")
LONGEST_LABEL = 24


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seeds, ordered by seed."""

    label: str
    histories: tuple[History, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return self.histories[0].settings

    @property
    def seeds(self) -> list[int]:
        return [history.seed for history in self.histories]

    def interval(self, value: Callable[[History], float | None]) -> Interval | None:
        """The mean of `value` over seeds; None if it is missing for a seed."""
        values = [value(history) for history in self.histories]
        known = [value for value in values if value is not None]
        return mean_interval(known) if len(known) == len(values) else None

    def curve(self, metric: str, by: Abscissa) -> Curve | None:
        """The mean of `metric` with its 95 % band, at the steps common to all seeds; None if there are none."""
        series = [history.series(metric) for history in self.histories]
        steps = sorted(set.intersection(*(set(one) for one in series)))
        if not steps:
            return None
        x = np.mean([history.abscissa(steps, by) for history in self.histories], axis=0)
        bands = [mean_interval([one[step] for one in series]) for step in steps]
        mean, low, high = ([getattr(band, end) for band in bands] for end in ("mean", "low", "high"))
        return Curve(self.label, x.tolist(), mean, *((low, high) if len(series) > 1 else (None, None)))

    def setting(self, name: str) -> Any:
        """The value of a setting; None if its runs are older than the setting."""
        return self.settings.get(name)

    @property
    def sources(self) -> list[Any]:
        """The settings that determine the text, whatever its tokenizer."""
        return [self.setting(name) for name in settings_of_text()]


def distinct(values: Iterable[T]) -> list[T]:
    """The distinct `values`, in order; they need not be hashable."""
    found: list[T] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def settings_key(settings: Mapping[str, Any]) -> str:
    """A canonical string of the settings."""
    return json.dumps(settings, sort_keys=True, default=str)


def without_repetitions(histories: Sequence[History]) -> tuple[list[History], list[str]]:
    """The histories without duplicates of settings and seed, and remarks on the duplicates."""
    first: dict[tuple[str, int], History] = {}
    remarks = []
    for history in histories:
        kept = first.setdefault((settings_key(history.settings), history.seed), history)
        if kept is not history:
            remarks.append(f"{history.path} is left out: it has the settings and the seed of {kept.path}.")
    return list(first.values()), remarks


def group_runs(histories: Sequence[History]) -> list[RunGroup]:
    """Group runs that differ only in seed, in order of first appearance."""
    members: dict[str, list[History]] = {}
    for history in histories:
        members.setdefault(settings_key(history.settings), []).append(history)
    unnamed = [RunGroup("", tuple(sorted(group, key=lambda history: history.seed))) for group in members.values()]
    return [replace(group, label=label) for group, label in zip(unnamed, _labels(unnamed), strict=True)]


def _labels(groups: Sequence[RunGroup]) -> list[str]:
    """Labels from differing settings if short, else from common folder names, else letters."""
    derived = {"text", *settings_with("follows_data")}
    varied = [name for name in varied_settings(groups) if name not in derived]
    by_setting = [
        ", ".join(choice_text(name, setting_cell(group.setting(name))) for name in varied) for group in groups
    ]
    by_folder = [_shared_name([history.path.name for history in group.histories]) for group in groups]
    for labels in (by_setting, by_folder):
        if len(set(labels)) == len(groups) and all(0 < len(label) <= LONGEST_LABEL for label in labels):
            return labels
    return [f"group {i}" for i in range(1, len(groups) + 1)]


def _shared_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("-_. ")


def varied_settings(groups: Sequence[RunGroup]) -> list[str]:
    """The settings that differ between groups.

    A variant's own setting is omitted if it has its default wherever the variant is chosen.
    """
    names = distinct(name for group in groups for name in group.settings)
    whole = [defaults_of_others(group.settings) | group.settings for group in groups]
    return [name for name in names if len({settings_key({"": values.get(name)}) for values in whole}) > 1]


def setting_cell(value: Any) -> Any:
    """A setting as a cell of a table."""
    return value if value is None or isinstance(value, str | bool) or is_number(value) else str(value)


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as text, such as "0, 3, 7"; four or more consecutive ones as "0–9"."""
    in_a_row = len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}–{seeds[-1]}" if in_a_row else ", ".join(map(str, seeds))
