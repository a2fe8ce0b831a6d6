"""Looking on while a model trains."""

from __future__ import annotations

from torch import Tensor


class Probe:
    """Sees every step and changes none; this one does not look."""

    def before_step(self, step: int) -> None:
        """`step`, counted from 1, comes next."""

    def before_update(self) -> None:
        """Its gradients are complete, in the unit of the loss and not clipped; its weights are still the old ones."""

    def after_update(self, grad_norm: Tensor) -> dict[str, float | None]:
        """It is done, and this was the norm of its gradient before clipping: what to write down, if anything."""
        return {}


NO_PROBE = Probe()
