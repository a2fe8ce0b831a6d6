"""Which families hold a model, and for a model that none holds, which comes nearest: from the families' own tables."""

from __future__ import annotations

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.families import Family, Obstacle


def obstacles_by_family(config: ModelConfig) -> dict[str, list[Obstacle]]:
    """For each family with models of this topology, all that stands in its way; those with least come first.

    Families that cannot have such a shape are left out; raises `UserError` if no other is there.
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
    """The families that hold the model."""
    return [name for name, obstacles in obstacles_by_family(config).items() if not obstacles]


def nearest_family(config: ModelConfig) -> tuple[str, list[Obstacle]]:
    """The family with the fewest obstacles, and those; raises `UserError` if none has models of this topology."""
    for family, obstacles in obstacles_by_family(config).items():
        return family, obstacles
    raise UserError(f"no known format holds this model: none is for topology {config.topology!r}")
