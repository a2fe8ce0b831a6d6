"""Norm placements: residual connections with their norms, one class each, registered by name."""

from minitransformer.architecture.residual.base import BranchGains, Place, Residual, Surroundings
from minitransformer.architecture.residual.depth_scaled import GPAS, Admin, DeepNorm, Keel, LayerNormScaling
from minitransformer.architecture.residual.earlier_layers import AttentionResiduals, ValueResidual
from minitransformer.architecture.residual.many_streams import MHCLite
from minitransformer.architecture.residual.mixed import B2TConnection, HybridNorm, HybridNormStar, MixLN
from minitransformer.architecture.residual.single_stream import (
    NoNorm,
    OLMo2,
    PeriLN,
    PostLN,
    PreLN,
    SandwichLN,
    ScaledPreLN,
)
from minitransformer.architecture.residual.two_streams import ResiDual, ScaledResiDual, SiameseNorm

__all__ = [
    "GPAS",
    "Admin",
    "AttentionResiduals",
    "B2TConnection",
    "BranchGains",
    "DeepNorm",
    "HybridNorm",
    "HybridNormStar",
    "Keel",
    "LayerNormScaling",
    "MHCLite",
    "MixLN",
    "NoNorm",
    "OLMo2",
    "PeriLN",
    "Place",
    "PostLN",
    "PreLN",
    "ResiDual",
    "Residual",
    "SandwichLN",
    "ScaledPreLN",
    "ScaledResiDual",
    "SiameseNorm",
    "Surroundings",
    "ValueResidual",
]
