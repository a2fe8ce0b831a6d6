"""Metadata of the settings of runs, from any version.

The configuration is imported late, because it imports torch, which would delay `--help` and errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from minitransformer.settings import Declared, all_declared, flattened, names_with

PARTS = "model", "data", "training"


def flat_settings(config: dict[str, Any], origin: str) -> dict[str, Any]:
    """The settings in a `config.json`, by their current flat names."""
    from minitransformer.training.config import RunConfig, as_of_today

    parts = as_of_today(config, origin)
    return {name: value for part in PARTS for name, value in flattened(RunConfig, parts[part]).items()}


def settings_with(about: str) -> set[str]:
    """The settings with the metadata `about`, such as "observes_only"."""
    from minitransformer.training.config import RunConfig

    return names_with(RunConfig, about)


def settings_of_task() -> list[str]:
    """The training settings that change the task, and so the meaning of the loss."""
    from minitransformer.training.config import TrainingConfig

    return sorted(names_with(TrainingConfig, "changes_task"))


def settings_of_text() -> list[str]:
    """The data settings that change the text, and not only how it is tokenized."""
    from minitransformer.training.data_config import DataConfig

    return sorted(names_with(DataConfig, "changes_task"))


def defaults_of_others(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The default settings of all variants that are not chosen in the flat `settings`."""
    chosen = {each.name for choice, each in _of_variants() if settings.get(choice) == each.variant.name}
    return {each.name: each.default for _, each in _of_variants() if each.name not in chosen}


@cache
def _of_variants() -> list[tuple[str, Declared]]:
    """Every setting of a variant, with the flat name of its choice."""
    from minitransformer.training.config import RunConfig

    known = list(all_declared(RunConfig))
    choices = {member: each.name for each in known if each.family for member in each.family.registry.values()}
    return [(choices[each.variant], each) for each in known if each.variant is not None]
