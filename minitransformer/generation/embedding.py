"""Embeddings: one vector for each text, pooled from the last hidden states of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.pooling import Pooling
from minitransformer.errors import UserError
from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.encoder import Encoder
from minitransformer.models.model import Model
from minitransformer.text.tokenizers import Framing, Tokenizer

SORTED_BATCHES = 32
"""batches of texts that are sorted by length together, so that rows of a batch have little padding"""


def usual_pooling(model: Model) -> str:
    """The pooling of a model that says nothing of it: only the last token of a decoder has seen the whole text.

    Raises `UserError` for other models than encoders and decoders.
    """
    if isinstance(model, DecoderLM):
        return "last"
    if isinstance(model, Encoder):
        return "mean"
    raise UserError(
        f"topology {model.config.topology!r} reads pairs of texts: embed texts with an encoder or a decoder"
    )


def framing_of_text(model: Model, tokenizer: Tokenizer) -> Framing:
    """The special tokens around a text, as the model has learned to see it."""
    return tokenizer.framing if isinstance(model, DecoderLM) else tokenizer.masked_framing


def text_embeddings(
    model: Any, texts: Sequence[Sequence[int]], pool: Pooling, *, normalise: bool
) -> Float[Tensor, "texts d_model"]:
    """pool(h₁ … hₙ) of each text, in float32 on the CPU, where h are the last hidden states; none may be empty.

    With `normalise`, each is divided by its Euclidean norm.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(text) for text in texts])
    is_token = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    tokens = torch.zeros(is_token.shape, dtype=torch.long, device=device)
    tokens[is_token] = torch.tensor([token for text in texts for token in text], device=device)
    with torch.inference_mode(), evaluating(model):
        pooled = pool(model.hidden_states(tokens, is_token=is_token).float(), is_token)
        return (F.normalize(pooled) if normalise else pooled).cpu()


def embed_in_batches(
    texts: Iterable[Sequence[int]], batch_size: int, embed_batch: Callable[[Sequence[Sequence[int]]], Tensor]
) -> Iterator[Float[Tensor, "d_model"]]:
    """The embedding of each text in turn, where `embed_batch` embeds `batch_size` texts of similar length."""
    rest = iter(texts)
    while some := list(islice(rest, SORTED_BATCHES * batch_size)):
        order = sorted(range(len(some)), key=lambda place: len(some[place]))
        found: dict[int, Tensor] = {}
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            found.update(zip(places, embed_batch([some[place] for place in places]), strict=True))
        yield from (found[place] for place in range(len(some)))
