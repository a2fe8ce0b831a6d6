"""The experiments, each in the module of its question; `Experiment.registry` has them all."""

from minitransformer.lab.experiment import Experiment
from minitransformer.lab.experiments import (
    audit,
    depth,
    forward,
    gradients,
    identities,
    ranking,
    stability,
    trainability,
    warmup,
)

__all__ = [
    "Experiment",
    "audit",
    "depth",
    "forward",
    "gradients",
    "identities",
    "ranking",
    "stability",
    "trainability",
    "warmup",
]
