"""A compressed run, made from a trained one, and the record of what that has cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minitransformer import files
from minitransformer.compression.base import Compression
from minitransformer.compression.calibration import Calibration
from minitransformer.compression.measuring import ModelFigures, QualityData
from minitransformer.compression.request import DEFAULT_TOKENS, CompressionConfig
from minitransformer.errors import UserError
from minitransformer.models.model import Model
from minitransformer.pretrained.originals import inherit_originals
from minitransformer.runs import Run, check_free, only_writer
from minitransformer.runs.begin import check_merges
from minitransformer.settings import flat
from minitransformer.text.corpora import named
from minitransformer.text.datasets import PreparedData
from minitransformer.text.datasets.text import TooShort
from minitransformer.training.config import RunConfig
from minitransformer.training.loader import Loader

RECORD = "compression.json"


@dataclass(frozen=True)
class Source:
    """A run to compress: its checkpoint, and its data, or other data of the same kind; None if there is none."""

    run: Run
    checkpoint: str
    config: RunConfig
    data: PreparedData | None

    @classmethod
    def open(cls, path: Path, checkpoint: str | None, data: Sequence[str]) -> Source:
        """Raises `UserError` for a run that cannot be compressed, and for data that it cannot read."""
        run = Run.open(path)
        check_merges(run)
        model = run.config.model
        if model.topology == "rnn":
            raise UserError("topology 'rnn' has no transformer blocks, and cannot be compressed")
        if model.weight_format.name != "fp32" and model.adapter.name == "none":
            raise UserError(f"{path} is compressed to {model.weight_format.name} already: compress what it was made of")
        config = run.config
        if data:
            config = replace(config, data=replace(config.data, data=tuple(data), validation_data=None))
        try:
            prepared = config.prepare(run.tokenizers) if data or run.text else None
        except TooShort:
            raise UserError(
                f"{named(data)} is too short: its training and its validation part need {config.sequence_length + 1} "
                "tokens each: give more --data"
            ) from None
        return cls(run, run.checkpoint(checkpoint).resolve().name, config, prepared)

    def model(self) -> Model:
        """Its model, with an adapter merged into it."""
        return self.run.load_model(self.checkpoint)

    def held_out(self) -> QualityData | None:
        """What quality is measured on."""
        if self.data is None or not self.data.num_tokens("validation"):
            return None
        return QualityData.of(self.config, Loader.of_run(self.config, self.data))

    def compressed(self, request: CompressionConfig) -> tuple[Compression, Model]:
        """The smaller model, and the method, which says what it has done; raises `UserError` if it cannot be."""
        method, model = request.method.make(), self.model()
        method.check(model)
        tokens = request.calibration_tokens
        if not method.calibrates:
            if tokens is not None:
                raise UserError(f"calibration_tokens is {tokens}, and {method.label} reads none: leave it out")
            return method, method.applied(model, None)
        if self.data is None:
            raise UserError(f"{self.run.path} has no training data to calibrate on: name files with --data")
        calibration = Calibration(self.config, self.data, DEFAULT_TOKENS if tokens is None else tokens)
        return method, method.applied(model, calibration)

    def write(
        self,
        out: Path,
        method: Compression,
        model: Model,
        request: CompressionConfig,
        figures: Mapping[str, ModelFigures],
    ) -> None:
        """Make the run folder `out` of `model`, with the record of how it was made; raises as `Run.create` does."""
        check_free(out)
        record = {
            "run": str(self.run.path),
            "checkpoint": self.checkpoint,
            "settings": flat(request),
            "label": method.label,
            "figures": {name: each.to_json() for name, each in figures.items()},
        }

        def add_files(folder: Path) -> None:
            inherit_originals(self.run.path, folder)
            files.write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")

        with only_writer(out):
            config = method.configured(self.run.config, model)
            whole = self.run.tokenizer, self.run.target_tokenizer, self.run.text
            Run.create(out, config, *whole, initial=model, add_files=add_files, sources=self.run.sources)
