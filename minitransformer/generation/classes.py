"""Classification of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderClassifier
from minitransformer.models.encoder import EncoderClassifier

Classifier = EncoderClassifier | DecoderClassifier


@torch.inference_mode()
def classify(model: Classifier, tokens: Sequence[int]) -> list[float]:
    """p(class | tokens) for each class; of a model with a single output, its value (a regression)."""
    device = next(model.parameters()).device
    with evaluating(model):
        logits = model(torch.tensor([tokens], device=device))[0].float()
    return (logits if len(logits) == 1 else logits.softmax(-1)).tolist()


def ranked_classes(model: Classifier, names: Sequence[str], tokens: Sequence[int]) -> str:
    """The classes called `names` with their probabilities in one line, the likeliest first."""
    ranked = sorted(zip(names, classify(model, tokens), strict=True), key=lambda entry: -entry[1])
    number = "{:.4g}" if len(ranked) == 1 else "{:.1%}"
    return ", ".join(f"{name} {number.format(value)}" for name, value in ranked)


def name_classes(
    model: Classifier, names: Sequence[str], texts: Sequence[Sequence[int]], begin: int = 0
) -> Iterator[str]:
    """The name of the likeliest class of each text, or the value of a regression; `begin` is the first one's number."""
    for tokens in texts:
        values = classify(model, tokens)
        yield f"{values[0]:.4g}" if len(values) == 1 else names[values.index(max(values))]
