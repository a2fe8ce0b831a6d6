"""The machine of a run: resolved once when it begins, and kept whenever it goes on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minitransformer.models.model import count_parameters
from minitransformer.training.config import RunConfig
from minitransformer.training.machine import Machine, Resolved, choose_machine, keep_machine

SETTINGS = "device", "precision", "compile"
"""what may be "auto" """


def machine_for(config: RunConfig) -> Machine:
    """The machine of a run that begins as `config`, whose vocabulary is known."""
    return choose_machine(*_asked(config), **_work(config))


def machine_again(kept: Resolved | None, config: RunConfig, anew: Collection[str]) -> tuple[Machine, list[str]]:
    """The machine of a run that goes on as `config`, and in words what differs from what was `kept`.

    `anew` names the settings that ask for something else since. An older version has kept nothing.
    """
    if kept is None:
        return machine_for(config), []
    return keep_machine(kept, *_asked(config), anew=anew, **_work(config))


def run_flops(config: RunConfig) -> float:
    """Floating-point operations of the whole run, about."""
    tokens = config.training.steps * config.tokens_per_step
    return 6 * count_parameters(config.model) * tokens


def _asked(config: RunConfig) -> tuple[str, str, str]:
    return config.training.device, config.training.precision, config.training.compile


def _work(config: RunConfig) -> dict[str, Any]:
    fixed_shapes = config.training.objective.variant.fixed_shapes
    return {"run_flops": run_flops(config), "fixed_shapes": fixed_shapes}
