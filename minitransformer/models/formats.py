"""Formats in which the matrices of a run may be stored; a format is a part of the run's configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from minitransformer.architecture.embeddings import ClassificationHead, LMHead, TokenEmbedding
from minitransformer.errors import UserError
from minitransformer.models.int4 import BLOCK, Int4Linear
from minitransformer.models.int8 import Int8Linear
from minitransformer.models.stored import StoredLinear, StoredTable
from minitransformer.models.surgery import copied, is_linear_map
from minitransformer.registry import Registered
from minitransformer.settings import setting

M = TypeVar("M", bound=nn.Module)
Fill = Callable[[str, StoredLinear, Tensor], None]
"""Sets a stored matrix, called as the linear map that it replaces, to what stands for the matrix of that"""


def leave_empty(name: str, part: StoredLinear, matrix: Tensor) -> None:
    """For a model whose weights will be loaded."""


class WeightFormat(Registered, kind="weight format"):
    """How the matrices of linear maps and token embeddings are stored; biases, norms and all others are in full."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def stored(self, linear: nn.Linear) -> StoredLinear:
        """What takes the place of a linear map inside a model."""
        raise NotImplementedError

    def applied(self, model: M, fill: Fill = leave_empty) -> M:
        """A copy of `model` with matrices in this format, of which `fill` sets each.

        Heads of language models and token embeddings, of which tied ones stay one matrix, are stored in 8 bits: they
        are more sensitive. Classification heads stay in full.
        """
        modules = list(model.named_modules())
        tables = {f"{name}.table" for name, part in modules if isinstance(part, TokenEmbedding)}
        heads = [name for name, part in modules if isinstance(part, ClassificationHead)]
        tied: dict[Any, StoredLinear] = {}

        def filled(name: str, part: StoredLinear, matrix: Tensor) -> StoredLinear:
            fill(name, part, matrix)
            return part

        def replace(name: str, module: nn.Module) -> nn.Module | None:
            if name in tables:
                assert isinstance(module, nn.Embedding)
                rows = Int8Linear(LMHead.holding(module.weight, None))
                tied[module.weight] = filled(name, rows, module.weight)
                return StoredTable(tied[module.weight])
            if not is_linear_map(module) or any(name.startswith(f"{head}.") for head in heads):
                return None
            assert isinstance(module, nn.Linear)
            if not isinstance(module, LMHead):
                return filled(name, self.stored(module), module.weight)
            product = Int8Linear(module)
            if module.weight in tied:
                product.weight, product.scale = tied[module.weight].weight, tied[module.weight].scale
            else:
                fill(name, product, module.weight)
            return module.around(product)

        return copied(model, replace)


class FullPrecision(WeightFormat, name="fp32"):
    """All weights in float32."""

    def applied(self, model: M, fill: Fill = leave_empty) -> M:
        return model


class Int8Rows(WeightFormat, name="int8"):
    """8 bits a weight, with a scale for each row: Dettmers et al. 2022 (LLM.int8(), arXiv 2208.07339), section 2.1."""

    def stored(self, linear: nn.Linear) -> StoredLinear:
        return Int8Linear(linear)


class Int4Groups(WeightFormat, name="int4"):
    """4 bits a weight, with a scale for each group of neighbours in a row; heads and token embeddings in 8 bits."""

    @dataclass(frozen=True)
    class Settings:
        group_size: int = setting(
            BLOCK, at_least=1, most=1 << 20, help=f"weights of a row that share a scale, a multiple of {BLOCK}"
        )

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if settings.group_size % BLOCK:
            raise UserError(f"int4_group_size is {settings.group_size}: give a multiple of {BLOCK}")

    def stored(self, linear: nn.Linear) -> StoredLinear:
        return Int4Linear(linear, self.settings.group_size)
