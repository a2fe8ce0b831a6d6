"""torch's optimizers without torch's compiler, which they load on the way: that takes as long as loading torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _bare(method: Callable[..., Any]) -> Callable[..., Any]:
    """What torch has wrapped to hide it from the compiler, which is never given an optimizer here."""
    return getattr(method, "__wrapped__", method)


class LightOptimizer(torch.optim.Optimizer):
    """`torch.optim.Optimizer`, with the same methods."""

    found_inf: Tensor | None = None
    """1 on the device of the weights if the next step is to change nothing, as torch's fused optimizers call it"""

    add_param_group = _bare(torch.optim.Optimizer.add_param_group)
    state_dict = _bare(torch.optim.Optimizer.state_dict)
    load_state_dict = _bare(torch.optim.Optimizer.load_state_dict)


class LightAdamW(LightOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW`, with the same steps."""

    step = torch.no_grad()(_bare(torch.optim.AdamW.step))
