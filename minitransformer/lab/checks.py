"""Checks of the laboratory, and the small float64 models that they compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.lab.subjects import MakeModel, Placement, real_config
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model

SMALL: dict[str, Any] = {"d_model": 16, "vocab_size": 11, "context_length": 8}
LAYERS = 4
"""the minimum for Mix-LN to have a Post-LN layer"""
EXACT, SINGLE = 1e-12, 1e-6
"""tolerances in float64, relative to the largest value, and in float32"""


@dataclass(frozen=True)
class Outcome:
    """The distance from equality; None if the models cannot be compared, for the reason in `note`.

    It is open without a reference.
    """

    distance: float | None
    note: str = ""
    is_open: bool = False


@dataclass(frozen=True)
class Check:
    """A claim that holds if the distance is at most `tolerance`, for any maker of models and seed."""

    claim: str
    tolerance: float
    measure: Callable[[MakeModel, int], Outcome]


def small_config(residual: str, **choices: Any) -> ModelConfig:
    return real_config(Placement(residual), **{"num_layers": LAYERS} | SMALL | choices)


def small_model(make: MakeModel, residual: str, seed: int, **choices: Any) -> Any:
    """A float64 decoder with randomised weights: see `shaken`."""
    return shaken(make(small_config(residual, **choices), seed).double(), seed)


@torch.no_grad()
def shaken(model: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """The model with linear layers and embeddings N(0, std²), and noise added to all other initial weights.

    That is N(0, 0.3²) for vectors and scalars, and N(0, std²) for other matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for weight in model.parameters():
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_((0 if id(weight) in drawn else weight) + (0.3 if weight.dim() < 2 else std) * draw)
    return model


def tokens_and_probe(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a random direction: gradients are those of its product with the logits."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SMALL["vocab_size"], (2, SMALL["context_length"]), generator=generator)
    return tokens, torch.randn(*tokens.shape, SMALL["vocab_size"], generator=generator, dtype=torch.float64)


def redrawn(model: Model, seed: int) -> Model:
    """The model with newly drawn initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialise()
    return model


def plain_name(name: str) -> str:
    # Mixed placements have the placement of their layer as `connection`.
    return name.replace(".connection.", ".")


def relative(first: Tensor, second: Tensor) -> float:
    """The largest difference relative to the largest value; infinity for NaN."""
    apart, largest = float((first - second).abs().max()), float(second.abs().max())
    if apart == 0:
        return 0.0
    return apart / largest if largest > 0 and math.isfinite(apart) else math.inf
