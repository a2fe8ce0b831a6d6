"""Optimizers by name; each makes its parameter groups from a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from minitransformer.registry import lookup


@dataclass(frozen=True)
class OptimizerSettings:
    """The numbers that optimizers are made from."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float


def adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW, fused where torch has it; only matrices decay. Loshchilov and Hutter 2017 (arXiv 1711.05101)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=fused)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerSettings], torch.optim.Optimizer]] = {"adamw": adamw}


def build_optimizer(name: str, model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer called `name` for `model`; each of its groups remembers its highest learning rate."""
    optimizer = lookup("optimizer", name, OPTIMIZERS)(model, settings)
    for group in optimizer.param_groups:
        group["highest_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's learning rate to `share` of its highest one."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["highest_lr"]
