"""The interface of compression methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from minitransformer.compression.calibration import Calibration
from minitransformer.models.model import Model
from minitransformer.registry import Registered
from minitransformer.training.config import RunConfig


class Compression(Registered, kind="compression method"):
    """Makes a smaller model of a trained one."""

    calibrates: ClassVar[bool] = True
    """whether it needs data"""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.remarks: list[str] = []
        """what it has measured and done, in lines of a name and a text"""

    @property
    def label(self) -> str:
        """What it does, without how much of it: runs that differ in how much are points of one curve."""
        return self.name

    def check(self, model: Model) -> None:
        """Raises `UserError` for a model that it cannot compress."""

    def applied(self, model: Model, calibration: Calibration | None) -> Model:
        """The smaller model, with its configuration; `model`, in full precision, must not be used any more."""
        raise NotImplementedError

    def configured(self, config: RunConfig, model: Model) -> RunConfig:
        """The configuration of a run of the smaller `model`, made from one of `config`."""
        return replace(config, model=model.config)
