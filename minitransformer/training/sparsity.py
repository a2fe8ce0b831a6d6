"""Weights that stay 0 while a pruned model trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitransformer.models.surgery import is_linear_map


class ZeroWeights:
    """The weights of the linear maps of `model` that are 0 before a step, which are 0 after it too."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        weights: list[Tensor] = [part.weight for part in model.modules() if is_linear_map(part)]  # type: ignore[misc]
        trained = {id(weight): weight for weight in weights if weight.requires_grad}
        self.masks = [(weight, weight != 0) for weight in trained.values()]

    @torch.no_grad()
    def restore(self) -> None:
        for weight, mask in self.masks:
            weight.mul_(mask)
