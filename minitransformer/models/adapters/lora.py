"""Low-rank adapters of linear maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.embeddings import LMHead
from minitransformer.errors import UserError
from minitransformer.models.adapters.base import Adapter, M, frozen, name_pattern, of_new_head
from minitransformer.models.surgery import copied, is_linear_map
from minitransformer.settings import setting


class LoRA(Adapter, name="lora"):
    """x Wᵀ + b + (alpha / rank) · dropout(x) Aᵀ Bᵀ, of which A and B are trained. Hu et al. 2021 (arXiv 2106.09685).

    Section 4.1. By default in all linear maps but the head: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 4.
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

    learning_rate = 1e-3
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.pattern = name_pattern(settings.pattern, "lora_pattern")
        self.also_train = name_pattern(settings.also_train or "", "lora_also_train")

    def applied(self, model: M) -> M:
        trained = {id(weight) for weight in of_new_head(model)}
        modules = ((name, module) for name, module in model.named_modules() if is_linear_map(module))
        maps = {name for name, each in modules if not is_head(each) and id(each.weight) not in trained}
        chosen = {name for name in maps if self.pattern.fullmatch(name)}
        if not chosen:
            some = ", ".join(sorted(maps)[:3])
            raise UserError(
                f"lora_pattern {self.settings.pattern!r} matches no linear map of the model: "
                f"they have names such as {some}"
            )

        def replace(name: str, module: nn.Module) -> nn.Module | None:
            if name not in chosen:
                return None
            assert isinstance(module, nn.Linear)
            return LoRALinear(module, self.settings)

        adapted = copied(frozen(model), replace)
        self._check_names(adapted)
        for name, parameter in adapted.named_parameters():
            if self.also_train.fullmatch(name):
                parameter.requires_grad_(True)
        return adapted

    def _check_names(self, model: nn.Module) -> None:
        wanted = self.settings.also_train
        if wanted is not None and not any(self.also_train.fullmatch(name) for name, _ in model.named_parameters()):
            raise UserError(f"lora_also_train {wanted!r} matches no weight of the model: correct it, or leave it out")

    def merged(self, model: M) -> M:
        return copied(model, lambda name, module: module.merged() if isinstance(module, LoRALinear) else None)


def is_head(module: nn.Module) -> bool:
    """Whether it is the head of a language model, whose matrix may be that of the token embedding."""
    return isinstance(module, LMHead)


class LowRankUpdate(nn.Module):
    """scale · dropout(x) Aᵀ Bᵀ, with A [rank, in] drawn as the weights of `nn.Linear` are, and B [out, rank] = 0."""

    def __init__(self, in_features: int, out_features: int, settings: LoRA.Settings) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(settings.rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, settings.rank))
        self.dropout = Dropout(settings.dropout)
        self.scale = settings.alpha / settings.rank

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(F.linear(self.dropout(x), self.a), self.b) * self.scale

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
        return F.linear(x, self.weight, self.bias) + self.lora(x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear map with the weights W + scale · B A."""
        linear = self.kind(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.weight.double() + self.lora.matrix()
        linear.weight, linear.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return linear
