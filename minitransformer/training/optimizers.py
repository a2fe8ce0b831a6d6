"""Optimizers by name. Parameters are grouped into matrices, embeddings, the head, and vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from minitransformer.architecture.embeddings import LMHead
from minitransformer.architecture.norms import AT_LEAST_SMALLEST
from minitransformer.registry import Registered
from minitransformer.settings import Chosen, setting
from minitransformer.training.light import LightAdamW, LightOptimizer
from minitransformer.training.muon import NEWTON_SCHULZ, Muon
from minitransformer.training.parallel import Parallel
from minitransformer.training.shards import by_mesh


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, with `embedding_lr` for embeddings and vectors, and the weight decay of matrices."""

    lr: float
    embedding_lr: float
    head_lr: float
    weight_decay: float


@dataclass(frozen=True)
class ParameterGroups:
    """The trainable parameters of a model by kind, each once."""

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    head: list[nn.Parameter]
    """an untied head"""
    vectors: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> ParameterGroups:
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        heads = {id(module.weight) for module in model.modules() if isinstance(module, LMHead)} - tables
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            [p for p in trained if p.dim() >= 2 and id(p) not in tables | heads],
            [p for p in trained if id(p) in tables],
            [p for p in trained if id(p) in heads],
            [p for p in trained if p.dim() < 2],
        )


class Optimizer(Registered, kind="optimizer"):
    """One or several of torch's optimizers, which share the parameters of a model."""

    needs_whole_matrices: ClassVar[bool] = False
    """whether the update of a number depends on the others of its matrix"""

    def __init__(self, settings: Any, rates: Rates, parallel: Parallel | None = None) -> None:
        self.settings, self.rates, self.parallel = settings, rates, parallel

    def build(self, weights: ParameterGroups) -> list[LightOptimizer]:
        """The optimizers, with their parameter groups and peak learning rates."""
        raise NotImplementedError


class AdamW(Optimizer, name="adamw"):
    """AdamW, with weight decay of matrices and embeddings only. Loshchilov and Hutter 2017 (arXiv 1711.05101)."""

    @dataclass(frozen=True)
    class Settings:
        beta1: float = setting(
            0.9, flag="beta1", at_least=0, below=1, help="AdamW's β₁, the decay of the gradient mean"
        )
        beta2: float = setting(
            0.95, flag="beta2", at_least=0, below=1, help="AdamW's β₂, the decay of the mean squared gradient"
        )
        eps: float = setting(
            1e-8, flag="eps", **AT_LEAST_SMALLEST, help="AdamW's ε, added to the root of the mean squared gradient"
        )

    settings: Settings

    def build(self, weights: ParameterGroups) -> list[LightOptimizer]:
        rates = self.rates
        groups = [
            {"params": weights.matrices, "lr": rates.lr, "weight_decay": rates.weight_decay},
            {"params": weights.embeddings, "lr": rates.embedding_lr, "weight_decay": rates.weight_decay},
            {"params": weights.head, "lr": rates.head_lr, "weight_decay": rates.weight_decay},
            {"params": weights.vectors, "lr": rates.embedding_lr, "weight_decay": 0.0},
        ]
        return [self.adamw(groups)]

    def adamw(self, groups: list[dict[str, Any]]) -> LightOptimizer:
        """torch's fused AdamW for `groups`, whose parameters it takes together only on the same ranks."""
        groups = [{**group, "params": parameters} for group in groups for parameters in by_mesh(group["params"])]
        betas = (self.settings.beta1, self.settings.beta2)
        return LightAdamW(groups, betas=betas, eps=self.settings.eps, fused=True)


class MuonWithAdamW(AdamW, name="muon"):
    """Muon for matrices, with weight decay; AdamW for embeddings, the head and vectors, without. Jordan et al. 2024."""

    @dataclass(frozen=True)
    class Settings(AdamW.Settings):
        momentum: float = setting(0.95, flag="momentum", at_least=0, below=1, help="momentum of Muon")
        newton_schulz: str = setting(
            "jordan", flag="newton-schulz", choices=NEWTON_SCHULZ, help="coefficients of the Newton-Schulz iteration"
        )
        newton_schulz_steps: int = setting(
            5, flag="newton-schulz-steps", at_least=1, help="number of Newton-Schulz iterations"
        )

    settings: Settings
    needs_whole_matrices = True

    def build(self, weights: ParameterGroups) -> list[LightOptimizer]:
        settings, rates = self.settings, self.rates
        rest = [
            {"params": weights.embeddings + weights.vectors, "lr": rates.embedding_lr, "weight_decay": 0.0},
            {"params": weights.head, "lr": rates.head_lr, "weight_decay": 0.0},
        ]
        matrices = Muon(
            weights.matrices,
            lr=rates.lr,
            momentum=settings.momentum,
            weight_decay=rates.weight_decay,
            quintics=NEWTON_SCHULZ[settings.newton_schulz](settings.newton_schulz_steps),
            parallel=self.parallel,
        )
        return [matrices, self.adamw(rest)]


def build_optimizers(
    optimizer: Chosen[Optimizer], model: nn.Module, rates: Rates, parallel: Parallel | None = None
) -> list[LightOptimizer]:
    """The optimizers of `model`; each parameter group stores its peak learning rate."""
    optimizers = optimizer.make(rates, parallel).build(ParameterGroups.of(model))
    for each in optimizers:
        for group in each.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[LightOptimizer], multiplier: float) -> None:
    """Set each group's learning rate to `multiplier` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = multiplier * group["peak_lr"]
