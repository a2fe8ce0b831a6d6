"""Matrices in 8 bits, by rounding, and in 4 bits, by rounding or calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.architecture.block import Block
from minitransformer.compression.base import Compression
from minitransformer.compression.calibration import Calibration, hooked
from minitransformer.compression.gptq import rounded_by_gptq
from minitransformer.models.formats import Int4Groups, Int8Rows, WeightFormat
from minitransformer.models.int4 import dequantise_groups, pack
from minitransformer.models.model import Model
from minitransformer.models.stored import StoredLinear
from minitransformer.models.surgery import is_linear_map
from minitransformer.settings import Chosen, setting

StoredMatrices = Mapping[str, tuple[Tensor, Tensor]]
"""What stands for the matrices of linear maps, by their names"""


@torch.no_grad()
def stored_in(model: Model, chosen: Chosen[WeightFormat], found: StoredMatrices) -> Model:
    """`model` in another format: matrices that are not `found` are rounded."""

    def fill(name: str, part: StoredLinear, matrix: Tensor) -> None:
        part.hold(*(found[name] if name in found else part.quantise(matrix)))

    made = chosen.make().applied(model, fill)
    made.config = replace(model.config, weight_format=chosen)
    return made


class RoundToInt8(Compression, name="int8"):
    """8 bits a weight, by rounding, with a scale for each row."""

    calibrates = False

    def applied(self, model: Model, calibration: Calibration | None) -> Model:
        return stored_in(model, Int8Rows.choose(), {})


class RoundToInt4(Compression, name="int4"):
    """4 bits a weight, with a scale for each group of neighbours in a row; heads and token embeddings in 8 bits."""

    @dataclass(frozen=True)
    class Settings(Int4Groups.Settings):
        rounding: str = setting(
            "gptq",
            choices=("gptq", "nearest"),
            help="to the nearest, or by GPTQ, which makes up for the error of each weight by those after it",
        )

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.format = Int4Groups.choose(group_size=settings.group_size)
        self.format.make()

    @property
    def label(self) -> str:
        return "int4 by GPTQ" if self.calibrates else "int4 to the nearest"

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.settings.rounding == "gptq"

    def applied(self, model: Model, calibration: Calibration | None) -> Model:
        found = {} if calibration is None else _calibrated(model, calibration, self.settings.group_size)
        return stored_in(model, self.format, found)


@torch.no_grad()
def _calibrated(model: Model, calibration: Calibration, group_size: int) -> StoredMatrices:
    """The linear maps of all blocks, one block after the other: each sees what rounded blocks before it give."""
    found = {}
    for prefix, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        maps: dict[str, Any] = {name: part for name, part in block.named_modules() if is_linear_map(part)}
        hessians = _hessians(model, maps, calibration)
        for name, part in maps.items():
            integers, scale = rounded_by_gptq(part.weight, hessians[name], group_size)
            found[f"{prefix}.{name}"] = stored = pack(integers), scale
            part.weight.copy_(dequantise_groups(*stored, part.in_features))
    return found


def _hessians(model: nn.Module, maps: Mapping[str, Any], calibration: Calibration) -> dict[str, Tensor]:
    """2 X Xᵀ of the inputs of each of `maps`."""
    sums = {name: part.weight.new_zeros(part.in_features, part.in_features) for name, part in maps.items()}

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        sums[name].addmm_(rows.t(), rows, alpha=2.0)

    handles = [
        part.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
        for name, part in maps.items()
    ]
    with hooked(handles):
        calibration.run(model)
    return sums
