"""The mean of the weights of several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from minitransformer.models.model import Model
from minitransformer.runs.open import Run
from minitransformer.training.weights import unique_tensors


@torch.no_grad()
def average_model(run: Run, checkpoints: Sequence[Path]) -> Model:
    """The model of `run` with the mean of the weights in `checkpoints`, computed in float64; counters are the last's.

    Vaswani et al. 2017 (arXiv 1706.03762), section 6.1; Izmailov et al. 2018 (arXiv 1803.05407).
    """
    sums: dict[str, torch.Tensor] = {}
    for checkpoint in checkpoints:
        model = run.load_model(checkpoint.name)
        for name, tensor in unique_tensors(model).items():
            if tensor.is_floating_point():
                sums[name] = sums[name] + tensor if name in sums else tensor.double()
    for name, tensor in unique_tensors(model).items():
        if name in sums:
            tensor.copy_(sums[name] / len(checkpoints))
    return model
