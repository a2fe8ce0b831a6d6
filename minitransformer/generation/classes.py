"""Classification of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minitransformer.generation.modes import evaluating
from minitransformer.models.encoder import EncoderClassifier


@torch.inference_mode()
def classify(model: EncoderClassifier, tokens: Sequence[int]) -> list[float]:
    """p(class | tokens) for each class; of a model with a single output, its value (a regression)."""
    device = next(model.parameters()).device
    with evaluating(model):
        logits = model(torch.tensor([tokens], device=device))[0].float()
    return (logits if len(logits) == 1 else logits.softmax(-1)).tolist()
