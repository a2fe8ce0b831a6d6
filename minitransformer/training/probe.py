"""The interface of diagnostics during training."""

from __future__ import annotations

from torch import Tensor


class Probe:
    """Called at every step, without effect on training; this base class measures nothing."""

    def before_step(self, step: int) -> None:
        """Called before `step`, counted from 1."""

    def before_update(self) -> None:
        """Called with complete gradients, unscaled and not clipped, before the weights change."""

    def after_update(self, grad_norm: Tensor) -> dict[str, float | None]:
        """Called after the step with the gradient norm before clipping; returns the figures to log."""
        return {}


NO_PROBE = Probe()
