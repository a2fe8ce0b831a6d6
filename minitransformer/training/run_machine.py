"""The machine of a run: resolved when it starts, and kept on resume."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minitransformer.models.model import count_parameters
from minitransformer.training.config import RunConfig
from minitransformer.training.machine import Machine, Resolved, choose_machine, keep_machine

SETTINGS = "device", "precision", "compile"
"""settings that may be "auto" """


def machine_for(config: RunConfig) -> Machine:
    """The machine of a new run of `config`, with known vocabulary."""
    return choose_machine(*_asked(config), **_work(config))


def machine_again(kept: Resolved | None, config: RunConfig, anew: Collection[str]) -> tuple[Machine, list[str]]:
    """The machine of a run resumed as `config`, and the differences from `kept`, in words.

    `anew` names the settings that were changed. Old runs have kept nothing.
    """
    if kept is None:
        return machine_for(config), []
    return keep_machine(kept, *_asked(config), anew=anew, **_work(config))


def run_flops(config: RunConfig) -> float:
    """Approximate floating-point operations of the whole run."""
    tokens = config.training.steps * config.tokens_per_step
    return 6 * count_parameters(config.model) * tokens


def _asked(config: RunConfig) -> tuple[str, str, str]:
    return config.training.device, config.training.precision, config.training.compile


def _work(config: RunConfig) -> dict[str, Any]:
    fixed_shapes = config.training.objective.variant.fixed_shapes
    return {"run_flops": run_flops(config), "fixed_shapes": fixed_shapes}
