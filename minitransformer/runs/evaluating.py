"""A trained model on data that it has not learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minitransformer.errors import UserError
from minitransformer.models.model import Model
from minitransformer.runs.open import Run
from minitransformer.text.datasets import Pairs, PreparedData
from minitransformer.training.data_config import DataConfig
from minitransformer.training.loader import Loader
from minitransformer.training.precision import Precision
from minitransformer.training.validation import Validation, validate


@dataclass(frozen=True)
class HeldOutData:
    """The `split` of the data that a run is evaluated on."""

    run: Run
    prepared: PreparedData
    split: str

    @classmethod
    def of_run(cls, run: Run) -> HeldOutData:
        """The validation split of `run`; raises `UserError` if there is none."""
        found = cls(run, run.config.prepare(run.tokenizers), "validation")
        if not found.prepared.num_tokens(found.split):
            raise UserError(f"{run.path} has no validation data: name a file with --data")
        return found

    @classmethod
    def of_files(cls, run: Run, data: Sequence[str], targets: str | None) -> HeldOutData:
        """All of `data`, with the `targets` of pairs; raises `UserError` for data that `run` cannot read."""
        config = replace(run.config, data=_with_data(run.config.data, tuple(data), targets))
        return cls(run, config.prepare(run.tokenizers, whole=True), "train")

    def evaluate(self, model: Model, device: torch.device) -> Validation:
        """Every metric of the run's objective for `model`, in float32."""
        loader = Loader.of_run(self.run.config, self.prepared, self.split)
        return validate(model, loader, Precision.named("fp32")(device))


def _with_data(old: DataConfig, data: tuple[str, ...], targets: str | None) -> DataConfig:
    dataset = old.dataset
    if dataset.variant is Pairs:
        reading = replace(dataset.settings, target_data=targets, validation_target_data=None)
        dataset = replace(dataset, settings=reading)
    elif targets is not None:
        raise UserError(f"target_data is for pairs, and the data of the run is {dataset.name}: leave it out")
    return replace(old, data=data, validation_data=None, validation_fraction=0.0, dataset=dataset)
