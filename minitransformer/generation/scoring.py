"""Scores of the tokens of many texts of one length, for statistics over them.

Texts share a batch, so that the last bits of a score depend on the others: `likelihoods` is for scores of single texts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderLM

LOGITS_AT_ONCE = 1 << 23


@torch.inference_mode()
def score_texts(
    model: DecoderLM, ids: Int[Tensor, "texts length"]
) -> tuple[Float[Tensor, "texts predicted"], Bool[Tensor, "texts predicted"]]:
    """−log p of every token but the first given those before it, and whether it is the likeliest one at its place.

    A text whose tokens from place k on are all the likeliest is what greedy decoding makes of its first k tokens.
    """
    device = next(model.parameters()).device
    at_once = max(1, LOGITS_AT_ONCE // (ids.size(1) * (model.config.vocab_size or 1)))
    nats, likeliest = [], []
    with evaluating(model):
        for some in ids.to(device).split(at_once):
            logits, targets = model(some[:, :-1]).float(), some[:, 1:]
            nats.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu())
            likeliest.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(nats), torch.cat(likeliest)
