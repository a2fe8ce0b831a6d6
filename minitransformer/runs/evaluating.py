"""A trained model on data that it has not learned: what is measured of each item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from minitransformer.errors import UserError
from minitransformer.evaluation.estimates import Samples
from minitransformer.evaluation.items import Items, join_items
from minitransformer.models.model import Model
from minitransformer.runs.open import Run
from minitransformer.runs.resume import check_same_text
from minitransformer.text.batches import IGNORE
from minitransformer.text.datasets import Pairs, PreparedData
from minitransformer.text.datasets.conversation_preparation import PreparedConversations
from minitransformer.text.datasets.label_preparation import PreparedLabels
from minitransformer.text.datasets.pair_data import PairData
from minitransformer.training.config import RunConfig
from minitransformer.training.data_config import DataConfig
from minitransformer.training.loader import Loader
from minitransformer.training.objectives import Causal
from minitransformer.training.objectives.base import Score
from minitransformer.training.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """What was measured of each item of a split, in the order of the data.

    `by_position` [2, positions] are the nats of the targets at each position of a row, and their number. Of labelled
    texts there are the `labels` [items] and the `probabilities` [items, classes].
    """

    items: Items
    by_position: Samples
    labels: npt.NDArray[np.int64] | None = None
    probabilities: Samples | None = None


@dataclass(frozen=True)
class HeldOutData:
    """The `split` of the data that a run is evaluated on, as `config` names it.

    Windows of text begin `stride` tokens apart, by default where the one before ends. Raises `UserError` for a stride
    that leaves tokens out, or where there are no windows.
    """

    run: Run
    config: RunConfig
    prepared: PreparedData
    split: str
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.stride is not None:
            _check_stride(self.config, self.stride)

    @classmethod
    def of_run(cls, run: Run, stride: int | None = None) -> HeldOutData:
        """The validation split of `run`; raises `UserError` if there is none, or if its text has changed since."""
        if not run.text:
            raise UserError(f"{run.path} was imported, and has no validation data: name a file with --data")
        found = cls(run, run.config, run.config.prepare(run.tokenizers), "validation", stride)
        check_same_text(run, found.config, found.prepared)
        if not found.prepared.num_tokens(found.split):
            raise UserError(f"{run.path} has no validation data: name a file with --data")
        return found

    @classmethod
    def of_files(cls, run: Run, data: Sequence[str], targets: str | None, stride: int | None = None) -> HeldOutData:
        """All of `data`, with the `targets` of pairs; raises `UserError` for data that `run` cannot read."""
        config = replace(run.config, data=_with_data(run.config.data, tuple(data), targets))
        prepared = config.data.dataset.make().prepare_whole(config.data_request(run.tokenizers))
        return cls(run, config, prepared, "train", stride)

    @cached_property
    def _preparation(self) -> Any:
        request = self.config.data_request(self.run.tokenizers)
        return self.config.data.dataset.make().preparation(request.whole() if self.split == "train" else request)

    @property
    def has_rows(self) -> bool:
        """Whether its items are rows of files, other than windows of text."""
        return self._preparation is not None

    def rows(self) -> tuple[Any, list[int]]:
        """The corpus of its rows, and which of these are its items; raises `UserError` for data without rows."""
        if not self.has_rows:
            raise UserError(
                f"this data has {self.kind}, which are no rows of a file: name labelled texts, pairs or "
                "conversations, or with --group-by also documents, in files with columns"
            )
        return self._preparation.corpus_of(self.split), self._preparation.rows(self.split)

    def column(self, name: str) -> list[str]:
        """[items] the values in the column `name`; raises `UserError` for data that has none."""
        corpus, rows = self.rows()
        values = list(corpus.column(name))
        return [values[row] for row in rows]

    @cached_property
    def loader(self) -> Loader:
        """The batches of the split, in order."""
        return Loader.of_run(self.config, self.prepared, self.split, self.stride)

    @property
    def kind(self) -> str:
        """What its items are, in the plural."""
        kinds = {PreparedLabels: "texts", PairData: "pairs", PreparedConversations: "conversations"}
        return next((name for of, name in kinds.items() if isinstance(self.prepared, of)), "windows")

    def text_of(self, number: int) -> dict[str, str]:
        """The text of an item, or its texts, by their names; of a window, what its model predicts."""
        prepared, tokenizer = self.prepared, self.prepared.tokenizer
        if isinstance(prepared, PairData):
            pair = prepared.pairs(self.split)
            texts = {"source": tokenizer.decode(pair.sources[number].tolist())}
            if isinstance(prepared, PreparedLabels):
                return {"text": texts["source"]}
            return {**texts, "reference": prepared.target_tokenizer.decode(pair.targets[number].tolist())}
        if isinstance(prepared, PreparedConversations):
            return {"text": tokenizer.decode(prepared.conversations(self.split).sources[number].tolist())}
        window = self.loader.shape.window
        first = number * (self.stride or window)
        overlap = window - (self.stride or window) if number else 0
        ids = prepared.targets(self.split)[first + overlap + 1 : first + window + 1]
        return {"text": tokenizer.decode(ids.tolist())}

    @torch.no_grad()
    def evaluate(self, model: Model, device: torch.device) -> Evaluation:
        """What the run's objective measures for `model`, in float32."""
        model.eval()
        precision, loader = Precision.named("fp32")(device), self.loader
        found, batches = _Found(loader), loader.validation_batches()
        for index in tqdm(range(len(batches)), desc=self.kind, unit="", leave=False, disable=None):
            batch = batches.batch(index)
            with precision.autocast():
                score = loader.objective.score(model, batch.to(precision.device))
            found.add(batch, score, batches.items(index))
        return found.evaluation()


@dataclass
class _Found:
    """What the batches of a split have given so far."""

    loader: Loader
    parts: list[Items] = field(default_factory=list)
    numbers: list[npt.NDArray[np.int64]] = field(default_factory=list)
    classes: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=list)
    by_position: Samples = field(default_factory=lambda: np.zeros((2, 0)))

    def add(self, batch: Any, score: Score, numbers: npt.NDArray[np.int64]) -> None:
        """Add the `score` of `batch`, whose items have these `numbers`."""
        items = score.items(batch)
        if self.loader.objective.predicts_text:
            items = replace(items, columns={**items.columns, "bytes": self._bytes(batch, len(items))})
        self.parts.append(items)
        self.numbers.append(numbers)
        if score.probabilities is not None:
            self.classes.append((batch.targets.numpy(), score.probabilities.cpu().double().numpy()))
        elif batch.targets.dim() == 2:
            is_target = (batch.targets != IGNORE).numpy()
            more = np.stack([score.nats.cpu().double().numpy().sum(0), is_target.sum(0)])
            missing = max(0, more.shape[1] - self.by_position.shape[1])
            self.by_position = np.pad(self.by_position, ((0, 0), (0, missing)))
            self.by_position[:, : more.shape[1]] += more

    def _bytes(self, batch: Any, count: int) -> Samples:
        """[items] bytes of the pieces of each item's targets."""
        is_target = batch.targets != IGNORE
        sizes = self._piece_sizes[batch.targets[is_target].numpy()]
        return np.bincount(batch.item_numbers[is_target].numpy(), sizes, count).astype(np.float64)

    @cached_property
    def _piece_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([len(piece) for piece in self.loader.data.target_tokenizer.pieces])

    def evaluation(self) -> Evaluation:
        """All of it, in the order of the data."""
        order = np.argsort(np.concatenate(self.numbers))
        items = join_items(self.parts)[order]
        if (size := self.loader.validation_bytes) is not None:
            # A public tokenizer may normalise the text, which changes its number of bytes.
            scaled = items.columns["bytes"] * (size / items.columns["bytes"].sum())
            items = replace(items, columns={**items.columns, "bytes": scaled})
        if not self.classes:
            return Evaluation(items, self.by_position)
        labels, probabilities = (np.concatenate(each)[order] for each in zip(*self.classes, strict=True))
        return Evaluation(items, self.by_position, labels, probabilities)


def _check_stride(config: RunConfig, stride: int) -> None:
    objective = config.training.objective
    if objective.variant is not Causal:
        raise UserError(
            f"stride is for models that predict the next token of a text, and the objective of the run is "
            f"{objective.name}: leave it out"
        )
    if stride > config.sequence_length:
        raise UserError(
            f"stride is {stride}, and the windows have {config.sequence_length} tokens: choose at most as many"
        )


def _with_data(old: DataConfig, data: tuple[str, ...], targets: str | None) -> DataConfig:
    dataset = old.dataset
    if dataset.variant is Pairs:
        reading = replace(dataset.settings, target_data=targets, validation_target_data=None)
        dataset = replace(dataset, settings=reading)
    elif targets is not None:
        raise UserError(f"target_data is for pairs, and the data of the run is {dataset.name}: leave it out")
    return replace(old, data=data, validation_data=None, validation_fraction=0.0, dataset=dataset)
