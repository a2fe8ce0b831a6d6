"""The limits of this machine: matrix-product throughput and memory bandwidth."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from minitransformer.benchmark.case import Cost, Work
from minitransformer.benchmark.workers import ContestantFailed, measured_alone
from minitransformer.errors import UserError

DEVICES = ("cpu", "cuda", "mps")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
READ_BYTES = 1 << 28
"""far more than the caches"""
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """FLOP/s by precision, and memory bandwidth in bytes/s."""

    flops: dict[str, float]
    bytes: float

    def share(self, cost: Cost, rate: float) -> float | None:
        """`rate`, in units/s, as a fraction of the limit; None for a precision without a measured limit.

        The limit is the roofline of Williams et al. 2009: the slower of compute and memory.
        """
        flops = self.flops.get(cost.precision, self.flops.get("bf16") if cost.precision == "int8" else None)
        if flops is None:
            return None
        return rate * max(cost.flops / flops, cost.bytes / self.bytes)


def measure_limits(device: str) -> Limits:
    """Both limits, each measured in a separate process; raises `ContestantFailed`."""
    flops = {name: measured_alone(partial(_multiplying, device, name), REPEATS) for name in DTYPES}
    return Limits(flops, measured_alone(partial(_reading, device), REPEATS))


def _multiplying(device: str, precision: str) -> Work:
    import torch

    from minitransformer.training.machine import measured_flops

    return Work(partial(measured_flops, torch.device(device), getattr(torch, DTYPES[precision])))


def _reading(device: str) -> Work:
    import torch

    data = torch.ones(READ_BYTES // 4, device=device)

    def sample() -> float:
        start = time.perf_counter()
        data.sum().item()
        return READ_BYTES / (time.perf_counter() - start)

    return Work(sample)


def chosen_device(name: str) -> str:
    """The device `name`, or the fastest for "auto", without importing torch here, which would count as memory of every
    contestant; raises `UserError` if it is unavailable."""
    if name == "cpu":
        return name
    try:
        kind = DEVICES[int(measured_alone(partial(_choosing, name)))]
    except ContestantFailed as failure:
        raise UserError(str(failure)) from None
    return kind if name == "auto" else name


def _choosing(name: str) -> Work:
    from minitransformer.training.machine import choose_device

    device = choose_device(name).type
    return Work(lambda: DEVICES.index(device))
