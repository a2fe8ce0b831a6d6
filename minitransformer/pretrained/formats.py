"""Which families can represent a model, or come nearest to it."""

from __future__ import annotations

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import Family, Obstacle


def obstacles_by_family(config: ModelConfig) -> dict[str, list[Obstacle]]:
    """The obstacles of each family with this topology, fewest first.

    Families that cannot have such a shape are left out; raises `UserError` if none is left.
    """
    obstacles: dict[str, list[Obstacle]] = {}
    refusals = []
    for name, family in Family.registry.items():
        if config.topology in family.architectures:
            try:
                obstacles[name] = family.obstacles(config)
            except UserError as error:
                refusals.append(error)
    if refusals and not obstacles:
        raise refusals[0]
    return dict(sorted(obstacles.items(), key=lambda entry: len(entry[1])))


def families_of(config: ModelConfig) -> list[str]:
    """The families that can represent the model."""
    return [name for name, obstacles in obstacles_by_family(config).items() if not obstacles]


def nearest_family(config: ModelConfig) -> tuple[str, list[Obstacle]]:
    """The family with the fewest obstacles, and these; raises `UserError` if none has this topology."""
    for family, obstacles in obstacles_by_family(config).items():
        return family, obstacles
    raise UserError(f"no known format can represent topology {config.topology!r}: choose another run")
