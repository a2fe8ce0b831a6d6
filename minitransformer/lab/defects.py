"""Models with one injected defect in their residual placement, for the audit of the laboratory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import getdoc

from minitransformer.architecture.residual import Residual
from minitransformer.lab import mistakes
from minitransformer.lab.subjects import make_model
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model


@dataclass(frozen=True)
class Defect:
    """A class with a defect, described in its docstring, that replaces its parent (None: no defect)."""

    placement: type[Residual] | None

    @property
    def title(self) -> str:
        if self.placement is None:
            return "no defect"
        mistake = getdoc(self.placement) or self.placement.__name__
        return f"{self.placement.name}: {mistake.removesuffix('.')}"

    def make(self, config: ModelConfig, seed: int) -> Model:
        """`make_model` with the defect in its placement."""
        if self.placement is not None and config.residual.name == self.placement.name:
            config = replace(config, residual=replace(config.residual, variant=self.placement))
        return make_model(config, seed)


DEFECTS = {"none": Defect(None)} | {
    name: Defect(mistake)
    for name, mistake in vars(mistakes).items()
    if getattr(mistake, "__module__", "") == mistakes.__name__
}
"""the classes in `mistakes` by name, at least one per placement of the package"""
