"""Looking on while a model trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minitransformer.training.step import StepResult


class Probe:
    """Sees every step and changes none; this one does not look."""

    def before_step(self, step: int) -> None:
        """`step`, counted from 1, comes next."""

    def before_update(self) -> None:
        """Its gradients are complete, in the unit of the loss and not clipped; its weights are still the old ones."""

    def after_update(self, result: StepResult) -> dict[str, float | None]:
        """It is done: what to write down about it, if anything."""
        return {}


NO_PROBE = Probe()
