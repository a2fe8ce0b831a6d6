"""Low-rank adapters of linear maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.embeddings import HeadAround, LMHead
from minitransformer.errors import UserError
from minitransformer.models.adapters.base import Adapter, M, frozen, name_pattern
from minitransformer.models.int8 import Int8Linear
from minitransformer.models.stored import StoredLinear, in_full, linear_map
from minitransformer.models.surgery import copied, is_linear_map
from minitransformer.settings import setting


class LoRA(Adapter, name="lora"):
    """x Wᵀ + b + (alpha / rank) · dropout(x) Aᵀ Bᵀ, of which A and B are trained. Hu et al. 2021 (arXiv 2106.09685).

    Section 4.1. By default in all linear maps but the head, and over an 8-bit W if so chosen: Dettmers et al. 2023
    (QLoRA, arXiv 2305.14314), sections 3 and 4.
    """

    @dataclass(frozen=True)
    class Settings:
        pattern: str = setting(
            ".*",
            help="regular expression for the whole names of the linear maps that are adapted, such as "
            "'.*attention.(query|value)'; heads of language models are not",
        )
        rank: int = setting(8, at_least=1, most=1 << 16, help="rank of the update of each matrix")
        alpha: float = setting(16.0, above=0, help="the update is multiplied by alpha / rank")
        dropout: float = setting(0.0, at_least=0, below=1, help="dropout probability of the update's input")
        also_train: str | None = setting(
            None, help="regular expression for the whole names of weights to train as well, such as 'head.*'"
        )
        base_weights: str = setting(
            "fp32",
            choices=("fp32", "int8"),
            help="format of the matrices that are not trained, but for heads and embeddings: int8 takes a quarter of "
            "the memory, and is part of what the adapter is trained for and merged into",
        )

    learning_rate = 1e-3
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.pattern = name_pattern(settings.pattern, "lora_pattern")
        self.also_train = name_pattern(settings.also_train or "", "lora_also_train")

    def applied(self, model: M) -> M:
        modules = list(frozen(model).named_modules())
        heads = {each.product for _, each in modules if isinstance(each, HeadAround)}
        linear = {name: each for name, each in modules if is_linear_map(each) or isinstance(each, StoredLinear)}
        maps: dict[str, Any] = {name: each for name, each in linear.items() if not is_head(each) and each not in heads}
        maps = {name: each for name, each in maps.items() if not each.weight.requires_grad}
        chosen = {name for name in maps if self.pattern.fullmatch(name)}
        if not chosen:
            some = ", ".join(sorted(maps)[:3])
            raise UserError(
                f"lora_pattern {self.settings.pattern!r} matches no linear map of the model: "
                f"they have names such as {some}"
            )
        self._train_others(model)
        rounded = self._rounded(maps)

        def replace(name: str, module: nn.Module) -> nn.Module | None:
            part: Any = Int8Linear(maps[name]) if name in rounded else maps.get(name)
            if name in chosen and isinstance(part, StoredLinear):
                part.lora = LowRankUpdate(part.in_features, part.out_features, self.settings)
            elif name in chosen:
                part = LoRALinear(part, self.settings)
            return part

        return copied(model, replace)

    def _train_others(self, model: nn.Module) -> None:
        wanted = self.settings.also_train
        others = [weight for name, weight in model.named_parameters() if self.also_train.fullmatch(name)]
        if wanted is not None and not others:
            raise UserError(f"lora_also_train {wanted!r} matches no weight of the model: correct it, or leave it out")
        for weight in others:
            weight.requires_grad_(True)

    def _rounded(self, maps: Mapping[str, Any]) -> set[str]:
        """The names of those of the linear `maps`, that are stored in 8 bits."""
        if self.settings.base_weights != "int8":
            return set()
        rounded = {name for name, each in maps.items() if is_linear_map(each) and not each.weight.requires_grad}
        if not rounded and any(isinstance(each, StoredLinear) for each in maps.values()):
            raise UserError("lora_base_weights 'int8' has no effect, as the base is stored in fewer bits: leave it out")
        if not rounded:
            raise UserError(
                f"lora_also_train {self.settings.also_train!r} trains every matrix, so that lora_base_weights 'int8' "
                "has none to store: leave one of them out"
            )
        return rounded

    def merged(self, model: M) -> M:
        return in_full(model)


def is_head(module: nn.Module) -> bool:
    """Whether it is the head of a language model, whose matrix may be that of the token embedding."""
    return isinstance(module, LMHead)


class LowRankUpdate(nn.Module):
    """y + scale · dropout(x) Aᵀ Bᵀ, with A [rank, in] drawn as the weights of `nn.Linear`, and B [out, rank] = 0."""

    def __init__(self, in_features: int, out_features: int, settings: LoRA.Settings) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(settings.rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, settings.rank))
        self.dropout = Dropout(settings.dropout)
        self.scale = settings.alpha / settings.rank

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        low = F.linear(self.dropout(x), self.a)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.b.t(), alpha=self.scale).view_as(y)

    def matrix(self) -> Float[Tensor, "out in"]:
        """scale · B A, in float64."""
        return self.scale * (self.b.double() @ self.a.double())


class LoRALinear(nn.Linear):
    """The linear map `linear`, whose weights keep their names, and a `LowRankUpdate` of it."""

    def __init__(self, linear: nn.Linear, settings: LoRA.Settings) -> None:
        nn.Module.__init__(self)  # that of `nn.Linear` would make and draw weights
        self.kind = type(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.lora = LowRankUpdate(self.in_features, self.out_features, settings)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.lora(F.linear(x, self.weight, self.bias), x)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """The linear map with the weights W + scale · B A."""
        weight = self.weight.double() + self.lora.matrix()
        return linear_map(self.kind, weight.to(self.weight.dtype), self.bias)
