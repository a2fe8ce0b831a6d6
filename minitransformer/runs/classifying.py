"""The classes that a run's model gives to texts, beside their labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from minitransformer.models.model import Model
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.training.loader import Loader


class Classified(NamedTuple):
    """A text, the number of its label, and the probability of each class."""

    text: str
    label: int
    probabilities: list[float]


@torch.inference_mode()
def classify_all(data: HeldOutData, model: Model) -> Iterator[Classified]:
    """Every text of `data` with its label."""
    device = next(model.parameters()).device
    for batch in Loader.of_run(data.run.config, data.prepared, data.split).validation_batches():
        rows: Any = batch.to(device)
        probabilities = model(rows.inputs, is_token=rows.is_token).double().softmax(-1).tolist()
        for ids, kept, label, of_classes in zip(
            rows.inputs, rows.is_token, rows.targets.tolist(), probabilities, strict=True
        ):
            yield Classified(data.prepared.tokenizer.decode(ids[kept].tolist()), label, of_classes)
