"""GELU without oneDNN, which takes several times as long as torch itself for the few numbers of a step (measured)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW_NUMBERS = 1 << 13


class RowGelu(TorchFunctionMode):
    """Within it, `F.gelu` of few float32 numbers on a CPU is torch's own; the mode holds for the thread that enters it.

    torch asks oneDNN for tensors whose numbers follow each other by rows, and not for the same numbers by columns.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.gelu and not kwargs and _is_for_torch(*args):
            return gelu_by_columns(*args)
        return function(*args, **(kwargs or {}))


def _is_for_torch(x: Tensor) -> bool:
    small = x.device.type == "cpu" and x.dtype == torch.float32 and int(x.numel()) <= FEW_NUMBERS
    return small and x.is_contiguous() and int(x.numel()) % 2 == 0


def gelu_by_columns(x: Tensor) -> Tensor:
    """`F.gelu` of the numbers of `x` in the shape of two columns, of which none follow each other in a row."""
    half = x.numel() // 2
    return F.gelu(x.as_strided((half, 2), (1, half))).as_strided(x.shape, x.stride())
