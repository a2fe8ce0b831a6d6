"""Optimizers by name. Each divides the weights of a model: matrices, embeddings (with the head), and vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from minitransformer.architecture.embeddings import LMHead
from minitransformer.registry import lookup
from minitransformer.training.light import LightAdamW, LightOptimizer
from minitransformer.training.muon import NEWTON_SCHULZ, Muon


@dataclass(frozen=True)
class OptimizerSettings:
    """The numbers that optimizers are made from; `embedding_lr` is for embeddings and vectors."""

    lr: float
    embedding_lr: float
    head_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    momentum: float
    newton_schulz: str = "jordan"
    newton_schulz_steps: int = 5
    eps: float = 1e-8


@dataclass(frozen=True)
class Weights:
    """The trainable weights of a model by kind, each once."""

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    head: list[nn.Parameter]
    """of its own, where it is not tied to an embedding"""
    vectors: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        heads = {id(module.weight) for module in model.modules() if isinstance(module, LMHead)} - tables
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            [p for p in trained if p.dim() >= 2 and id(p) not in tables | heads],
            [p for p in trained if id(p) in tables],
            [p for p in trained if id(p) in heads],
            [p for p in trained if p.dim() < 2],
        )


def _adamw(groups: list[dict[str, object]], settings: OptimizerSettings) -> LightOptimizer:
    return LightAdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def adamw(model: nn.Module, settings: OptimizerSettings) -> list[LightOptimizer]:
    """AdamW for all, fused; only matrices and embeddings decay. Loshchilov and Hutter 2017 (arXiv 1711.05101)."""
    weights = Weights.of(model)
    groups = [
        {"params": weights.matrices, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": weights.embeddings, "lr": settings.embedding_lr, "weight_decay": settings.weight_decay},
        {"params": weights.head, "lr": settings.head_lr, "weight_decay": settings.weight_decay},
        {"params": weights.vectors, "lr": settings.embedding_lr, "weight_decay": 0.0},
    ]
    return [_adamw(groups, settings)]


def muon(model: nn.Module, settings: OptimizerSettings) -> list[LightOptimizer]:
    """Muon for matrices, which alone decay; AdamW for embeddings, the head and vectors. Jordan et al. 2024."""
    weights = Weights.of(model)
    rest = [
        {"params": weights.embeddings + weights.vectors, "lr": settings.embedding_lr, "weight_decay": 0.0},
        {"params": weights.head, "lr": settings.head_lr, "weight_decay": 0.0},
    ]
    matrices = Muon(
        weights.matrices,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        quintics=lookup("Newton-Schulz iteration", settings.newton_schulz, NEWTON_SCHULZ)(settings.newton_schulz_steps),
    )
    return [matrices, _adamw(rest, settings)]


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerSettings], list[LightOptimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


def build_optimizers(name: str, model: nn.Module, settings: OptimizerSettings) -> list[LightOptimizer]:
    """The optimizers that `name` stands for; each group remembers its highest learning rate."""
    optimizers = lookup("optimizer", name, OPTIMIZERS)(model, settings)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["highest_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[LightOptimizer], share: float) -> None:
    """Set each group's learning rate to `share` of its highest one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["highest_lr"]
