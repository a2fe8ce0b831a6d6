"""Muon: momentum whose every direction counts the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.training.light import LightOptimizer


def orthogonalise(matrices: Float[Tensor, "count rows columns"], steps: int = 5) -> Float[Tensor, "count rows columns"]:
    """Roughly U Vᵀ for each matrix U S Vᵀ: a polynomial, applied `steps` times, takes its singular values near 1.

    Jordan et al. 2024 (Muon), Newton-Schulz iteration with their coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(LightOptimizer):
    """W ← (1 − lr · decay) W − lr · √max(1, rows/columns) · orthogonalise(Nesterov momentum), for matrices.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Torch's own works in bfloat16 on every device, which
    most processors only emulate; this one works in float32 but on CUDA, on all matrices of a shape at once.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings | {"newton_schulz_steps": newton_schulz_steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for parameters in same_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averages = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        skip = self.found_inf if self.found_inf is not None else torch.zeros((), device=parameters[0].device)
        # Where the step is skipped, an average moves towards itself, and the update is 0.
        gradients = [torch.where(skip > 0, a, g) for a, g in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        stacked = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        stacked = stacked.bfloat16() if stacked.is_cuda else stacked
        updates = orthogonalise(stacked, group["newton_schulz_steps"]).to(parameters[0].dtype) * (1 - skip)
        rows, columns = parameters[0].shape
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * (1 - skip))
        torch._foreach_add_(parameters, list(updates), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
