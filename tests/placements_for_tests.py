"""Every residual placement, with what it needs of a small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.architecture.attention import identity
from minitransformer.architecture.norms import LayerNorm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Place, Residual
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from tests.late_for_tests import late

OURS = [name for name, placement in Residual.registry.items() if placement.__module__.startswith("minitransformer.")]
"""placements of the package, without those of plugins"""


def choosing(residual: str) -> dict[str, Any]:
    """Choices of a model that make it one with this placement, whatever its size was to be."""
    try:
        ModelConfig(residual=residual, num_layers=1)
    except UserError:  # Mix-LN has no Post-LN layer below four
        return {"residual": residual, "num_layers": 4}
    return {"residual": residual}


@torch.no_grad()
def nudged(model: nn.Module) -> Any:
    """`model`, late in its training, with noise on every weight: none is 0 where its gradient or another would be."""
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return late(model)


EVERY_PLACEMENT = [choosing(name) for name in Residual.registry]
# Choices of a decoder that say what each token's step needs of the tokens before it.
WHAT_A_STEP_NEEDS: list[dict[str, Any]] = [
    *({"positions": name} for name in PositionScheme.registry),
    *EVERY_PLACEMENT,
    {"token_smear": True},
    {
        "attention_window": 3,
        "window_pattern": (True, False),
        "rotary_window_base": 20.0,
        "rotary_layers": (True, True, False),
        "rotary_scaling": "yarn",
        "rotary_factor": 4.0,
        "rotary_original_length": 8,
        "qk_norm": "each-head",
        "qkv_clip": 0.5,
    },
]


SUBLAYERS = ("attention", "feedforward")
Function = Callable[[Tensor], Tensor]


def by_hand(norm: LayerNorm) -> Function:
    def normalised(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()

    return lambda x: normalised(x) * norm.weight + norm.bias


class Connections(nn.Module):
    """Some sublayers in their residual connections, as a stack would run them."""

    def __init__(self, name: str, features: int = 6, num_layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        places = [
            Place(layer, num_layers, sublayer, d_model=features)
            for layer in range(num_layers)
            for sublayer in SUBLAYERS
        ]
        self.sublayers = nn.ModuleList(nn.Linear(features, features) for _ in places)
        chosen, make_norm = Residual.choose(name), partial(LayerNorm.choose().make, features)
        self.residuals = nn.ModuleList(chosen.make(make_norm, dropout, place) for place in places)
        self.shared = chosen.variant.Shared(chosen.settings, places)
        self.final_norm = chosen.variant.make_final_norm(chosen.settings, make_norm)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.shared.open(x)
        for connection, f in zip(self.residuals, self.sublayers, strict=True):
            stream = connection(stream, lambda y, f=f, mix_values=identity: mix_values(f(y)).tanh())
        return self.shared.close(stream, self.final_norm)
