"""torch's optimizers without importing torch's compiler, which takes as long as importing torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _bare(method: Callable[..., Any]) -> Callable[..., Any]:
    """Unwrap a method that torch disables for the compiler, which never sees an optimizer here."""
    return getattr(method, "__wrapped__", method)


class LightOptimizer(torch.optim.Optimizer):
    """`torch.optim.Optimizer`, with the same methods."""

    found_inf: Tensor | None = None
    """1, on the weights' device, to skip the next step; the name is that of torch's fused optimizers"""

    add_param_group = _bare(torch.optim.Optimizer.add_param_group)
    state_dict = _bare(torch.optim.Optimizer.state_dict)
    load_state_dict = _bare(torch.optim.Optimizer.load_state_dict)


class LightAdamW(LightOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW`, with the same steps."""

    step = torch.no_grad()(_bare(torch.optim.AdamW.step))
