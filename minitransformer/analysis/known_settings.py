"""What is known of the settings of runs, whatever version wrote them.

The configuration is imported late: it brings torch, for which `--help` and mistakes need not wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from minitransformer.settings import Declared, all_declared, flattened, names_with

PARTS = "model", "data", "training"


def flat_settings(config: dict[str, Any], origin: str) -> dict[str, Any]:
    """The settings in what `config.json` holds, by their flat names of today."""
    from minitransformer.training.config import RunConfig, as_of_today

    parts = as_of_today(config, origin)
    return {name: value for part in PARTS for name, value in flattened(RunConfig, parts[part]).items()}


def settings_with(about: str) -> set[str]:
    """The settings of which `about` is declared, such as "observes_only"."""
    from minitransformer.training.config import RunConfig

    return names_with(RunConfig, about)


def settings_of_task() -> list[str]:
    """The settings of training that make its loss one of another task."""
    from minitransformer.training.config import TrainingConfig

    return sorted(names_with(TrainingConfig, "changes_task"))


def defaults_of_others(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the settings of all variants but those that the flat `settings` choose."""
    chosen = {each.name for choice, each in _of_variants() if settings.get(choice) == each.variant.name}
    return {each.name: each.default for _, each in _of_variants() if each.name not in chosen}


@cache
def _of_variants() -> list[tuple[str, Declared]]:
    """Every setting of a variant, behind the flat name of the choice by which it applies."""
    from minitransformer.training.config import RunConfig

    known = list(all_declared(RunConfig))
    choices = {member: each.name for each in known if each.family for member in each.family.registry.values()}
    return [(choices[each.variant], each) for each in known if each.variant is not None]
