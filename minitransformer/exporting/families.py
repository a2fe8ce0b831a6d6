"""Which family of checkpoints holds a model, or what is in the way of one, with the flags that avoid it."""

from __future__ import annotations

from typing import Any

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import Family, Obstacle, nearest_family
from minitransformer.settings import kinds


def family_that_holds(config: ModelConfig, wanted: str | None, kind: type[Family] = Family) -> str:
    """The family to write; raises `UserError` with all obstacles, and the flags of train.py that avoid them."""
    if wanted is None:
        family, obstacles = nearest_family(config, kind)
    else:
        family, obstacles = wanted, kind.named(wanted).obstacles(config)
    if not obstacles:
        return family
    who = (
        "no known family can represent this model; the nearest is"
        if wanted is None
        else "this model cannot be exported as"
    )
    if obstacles[0].setting == "topology":
        raise UserError(f"{who} {family}: {obstacles[0]}")
    flags = " ".join(flag_of(obstacle) for obstacle in obstacles)
    why = "; ".join(map(str, obstacles))
    raise UserError(f"{who} {family}: {why}: train a model with {flags}, which {family} can represent")


def added_biases(config: ModelConfig, family: str, kind: type[Family] = Family) -> dict[str, str]:
    """What a certificate says of biases that the family always has, and the model has not."""
    _, zeros = kind.named(family).compared(config)
    return {"biases": f"zeros where the run has none, as {family} always has them"} if zeros else {}


def flag_of(obstacle: Obstacle) -> str:
    """The flag of train.py for the value that the family has."""
    name, value = obstacle.setting.replace("_", "-"), obstacle.choice
    if kinds(ModelConfig)[obstacle.setting] is bool:
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {_spelled(value)}"


def _spelled(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
