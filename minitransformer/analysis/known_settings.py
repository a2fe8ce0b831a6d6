"""What this version knows of the settings that runs were made with.

The declarations stand beside the code that they set, which needs torch: it is loaded at the first question, and no
command waits for it that only parses its flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from minitransformer.settings import Declared, all_declared, flattened, names_with

PARTS = "model", "data", "training"


def flat_settings(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The settings in the `config.json` of a run of any version, by their flat names, read from the file `origin`."""
    from minitransformer.training.config import RunConfig, as_of_today

    parts = as_of_today(dict(config), origin)
    return {name: value for part in PARTS for name, value in flattened(RunConfig, parts[part]).items()}


@cache
def settings_that(about: str) -> frozenset[str]:
    """The flat names of the settings of which `about` is declared, such as `observes_only`."""
    from minitransformer.training.config import RunConfig

    return frozenset(names_with(RunConfig, about))


@cache
def settings_of_task() -> frozenset[str]:
    """The flat names of the settings of training with other values of which losses do not compare."""
    from minitransformer.training.config import TrainingConfig

    return frozenset(names_with(TrainingConfig, "changes_task"))


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
