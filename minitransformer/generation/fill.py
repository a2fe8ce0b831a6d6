"""Filling masks: the most likely tokens of an encoder at masked positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minitransformer.generation.modes import evaluating
from minitransformer.models.encoder import EncoderLM
from minitransformer.text.tokenizers import Tokenizer

MASK = Tokenizer.mask_pattern
"""how a prompt spells a mask"""


def encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text`, with the tokenizer's mask token for each spelled mask."""
    first, *others = (tokenizer.encode(part) for part in tokenizer.mask_pattern.split(text))
    return [*first, *(token for part in others for token in (tokenizer.mask, *part))]


@torch.inference_mode()
def fill_masks(
    model: EncoderLM, tokens: Sequence[int], mask: int, *, guesses: int = 5, vocab_size: int | None = None
) -> list[list[tuple[int, float]]]:
    """For each `mask` among `tokens`, the most likely tokens with their probabilities, the most likely first.

    Each mask is filled independently of the others: p(token | unmasked tokens).
    """
    device = next(model.parameters()).device
    with evaluating(model):
        logits = model.token_logits(torch.tensor([tokens], device=device))[0, :, :vocab_size]
    places = [place for place, token in enumerate(tokens) if token == mask]
    likeliest = logits[places].float().softmax(-1).topk(min(guesses, logits.size(-1)))
    return [
        list(zip(ids, probabilities, strict=True))
        for ids, probabilities in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
