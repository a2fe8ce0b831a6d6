"""Full and mixed precision, one class each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from minitransformer.registry import Registered
from minitransformer.training.float8 import Float8Products
from minitransformer.training.light import LightOptimizer

FIRST_WITH_FLOAT8 = (8, 9)
"""compute capability of the first GPUs with FP8: Ada"""


class Precision(Registered, kind="precision"):
    """Weights, gradients and optimizer states are float32; within `autocast`, lower precision may be used."""

    dtype = torch.float32

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        """Why `device` does not support it, in words; None if it does."""
        return None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        loss.backward()

    def loss_scale(self) -> Tensor:
        """The factor of the loss in the next backward pass, without synchronising with the device."""
        return torch.ones((), device=self.device)

    def set_loss_scale(self, scale: float) -> None:
        """Use this factor in the next backward pass, where it is not always 1."""

    def unscale(self, optimizers: list[LightOptimizer]) -> None:
        """Undo the scaling of the gradients."""

    def update(self, optimizers: list[LightOptimizer], *, skip: Tensor) -> None:
        """One step of each optimizer, skipped if `skip` is 1, without synchronising with the device."""
        # torch's fused AdamW for MPS ignores `found_inf`.
        if self.device.type == "mps" and skip:
            return
        for optimizer in optimizers:
            optimizer.found_inf = skip
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FP32(Precision, name="fp32"):
    """float32 throughout."""

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()


class BF16(Precision, name="bf16"):
    """Matrix products in bfloat16, which has the range of float32. Kalamkar et al. 2019 (arXiv 1905.12322)."""

    dtype = torch.bfloat16


class FP8(BF16, name="fp8"):
    """As bf16, with the products of linear layers in FP8. Micikevicius et al. 2022 (arXiv 2209.05433)."""

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_WITH_FLOAT8:
            return "it has no matrix units for 8 bits"
        return "torch has no such products there" if device.type == "mps" else None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with super().autocast(), Float8Products():
            yield


class FP16(Precision, name="fp16"):
    """Matrix products in float16; the loss is scaled so that small gradients survive.

    Micikevicius et al. 2017 (arXiv 1710.03740), section 3.2.
    """

    dtype = torch.float16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.scaler = torch.amp.GradScaler(device.type)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def loss_scale(self) -> Tensor:
        return self.scaler.scale(super().loss_scale())

    def set_loss_scale(self, scale: float) -> None:
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale})

    def unscale(self, optimizers: list[LightOptimizer]) -> None:
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)

    def update(self, optimizers: list[LightOptimizer], *, skip: Tensor) -> None:
        super().update(optimizers, skip=skip)
        self.scaler.update()  # lowers the scale after an infinite gradient

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # a run in another precision so far has no scale
            self.scaler.load_state_dict(state)
