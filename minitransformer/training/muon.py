"""Muon: orthogonalised momentum."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.training.light import LightOptimizer
from minitransformer.training.parallel import Parallel
from minitransformer.training.shards import local_part

Quintic = tuple[float, float, float]
"""coefficients (a, b, c) of a x + b x³ + c x⁵"""
SMALLEST = 5e-4
"""smallest singular value, of a matrix of norm 1, that `polar_express` brings near 1"""
ROOM = 1.01
"""margin for rounding: above its interval, a polynomial of `polar_express` soon diverges"""


def jordan(steps: int) -> list[Quintic]:
    """The same polynomial in every step; five steps map (0, 1) to about (0.7, 1.2).

    Jordan et al. 2024 (Muon), public code.
    """
    return [(3.4445, -4.7750, 2.0315)] * steps


def polar_express(steps: int) -> list[Quintic]:
    """In each step, the minimax polynomial that maps the current interval, initially [`SMALLEST`, 1], closest to 1.

    Amsel et al. 2025 (Polar Express, arXiv 2505.16932), section 3.
    """
    lowest, highest, quintics = SMALLEST, 1.0, []
    for _ in range(steps):
        (a, b, c), error = nearest_to_one(lowest, highest)
        quintics.append((a / ROOM, b / ROOM**3, c / ROOM**5))  # of x / ROOM
        lowest, highest = 1 - error, 1 + error
    return [*quintics[:-1], (a, b, c)]  # no step follows the last, so it needs no margin


def nearest_to_one(lowest: float, highest: float) -> tuple[Quintic, float]:
    """The odd polynomial of degree 5 closest to 1 on an interval (minimax), and its maximum error.

    The error equioscillates at four points, among them both ends; the Remez exchange finds the other two.
    """
    if highest - lowest < 1e-4:  # where the system is singular: the limit
        return (15 / 8, -10 / 8, 3 / 8), 0.0
    inner = (3 * lowest + highest) / 4, (lowest + 3 * highest) / 4
    while True:
        points = torch.tensor([lowest, *inner, highest], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(signs)).tolist()
        # Where the derivative a + 3 b x² + 5 c x⁴ is 0.
        root = math.sqrt(9 * b * b - 20 * a * c)
        before, inner = inner, (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        if max(abs(x - y) for x, y in zip(before, inner, strict=True)) < 1e-9:
            return (a, b, c), error


NEWTON_SCHULZ: dict[str, Callable[[int], list[Quintic]]] = {"jordan": jordan, "polar-express": polar_express}


def orthogonalise(
    matrices: Float[Tensor, "count rows columns"], quintics: Sequence[Quintic]
) -> Float[Tensor, "count rows columns"]:
    """Approximately U Vᵀ for each matrix U S Vᵀ: the polynomials map the singular values close to 1.

    Newton-Schulz iteration: a X + b (X Xᵀ) X + c (X Xᵀ)² X has the singular values a s + b s³ + c s⁵.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in quintics:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(LightOptimizer):
    """W ← (1 − lr · decay) W − lr · √max(1, rows/columns) · orthogonalise(Nesterov momentum), for matrices.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. torch's own uses bfloat16 on every device, which
    most CPUs only emulate; this one uses float32 except on CUDA, for all matrices of a shape at once. Each rank
    orthogonalises some of the matrices, each of them whole.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        quintics: Sequence[Quintic] | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.quintics, self.parallel = quintics or jordan(5), parallel or Parallel()

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
        rows, columns = shape = parameters[0].shape
        averages = [local_part(self.state[p].setdefault("momentum", torch.zeros_like(p))) for p in parameters]
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        weights = [local_part(p) for p in parameters]
        skip = self.found_inf if self.found_inf is not None else torch.zeros((), device=weights[0].device)
        # In a skipped step, the average is unchanged and the update is 0.
        gradients = [torch.where(skip > 0, a, g) for a, g in zip(averages, gradients, strict=True)]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        stacked = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        stacked = stacked.bfloat16() if stacked.is_cuda else stacked
        updates = self.parallel.of_matrices(partial(orthogonalise, quintics=self.quintics), stacked, shape)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * (1 - skip))
        step = -group["lr"] * max(1, rows / columns) ** 0.5
        torch._foreach_add_(weights, list(updates.to(weights[0].dtype) * (1 - skip)), alpha=step)
