"""Log-likelihoods of texts: the same bits, whatever else is scored, in which order, and how many at once.

No forward pass holds two texts, and none is padded: the score of a text is computed by the same calls on the same
numbers wherever it stands. Texts that continue the same context, as the candidates of a question do, share its pass.

Batches would not do. Measured with torch 2.13 on a CPU with AVX-512, 1 to 8 threads, 32 to 4096 features: a row of a
float32 product (MKL) is the same bits at every place among 12 rows or more, but others among fewer; a row of a bfloat16
product (oneDNN), of a batched product, of fused attention, a norm or a softmax always is. But padding makes sums over
other keys, experts see a number of tokens that depends on the whole batch, and sums over streams, as those of the
residual placements mhc-lite and attention-residuals, are summed in another order at another place.

The cost, in processor time on one core, beside padded batches of 32 texts sorted by length, for models of 128 to 768
features (the larger, the lower): for texts of 8 to 15 tokens 3.6 to 1.9 times in float32 and 8 to 3 times in bfloat16;
for texts of 100 to 163 tokens 0.9 times, and 1.4 to 1.0; for four candidates after a prompt of 120 to 179 tokens 0.35
to 0.27 times, and 0.7 to 0.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.errors import UserError
from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderLM


class Continuation(NamedTuple):
    """The ids of a text that is scored, and of the context that it continues: neither is empty."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


class LogLikelihood(NamedTuple):
    """log p(ids | context) in nats, and whether each id is the likeliest one at its place."""

    nats: float
    is_greedy: bool


@torch.inference_mode()
def log_likelihoods(model: DecoderLM, texts: Sequence[Continuation]) -> list[LogLikelihood]:
    """log p(ids | context) = Σₜ log p(idₜ | context, ids before t) of each text.

    The logits become log-probabilities in float32, and these are summed exactly. Raises `UserError` for a text that is
    longer than the context of the model, and for a model whose logits are not finite.
    """
    by_context: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for text in texts:
        _check_length(model, text)
        by_context.setdefault(text.context, set()).add(text.ids)
    found: dict[Continuation, LogLikelihood] = {}
    with evaluating(model):
        for context, continuations in by_context.items():
            for ids, score in _scored_after(model, context, continuations):
                found[Continuation(context, ids)] = score
    return [found[text] for text in texts]


def _check_length(model: DecoderLM, text: Continuation) -> None:
    assert min(map(len, text)) > 0, "a context and a text have at least one id each"
    # The last token is predicted, but not read.
    length, most = len(text.context) + len(text.ids) - 1, model.config.text_length
    if length > most:
        raise UserError(
            f"a text of {length + 1} tokens is to be scored, and the model reads {most}: give a shorter prompt, or "
            "fewer examples in it"
        )


def _scored_after(
    model: DecoderLM, context: Sequence[int], continuations: Iterable[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], LogLikelihood]]:
    """Each of `continuations` with its score, after a context that is read once."""
    read = [*model.prefix, *context]
    cache = model.new_cache(len(read))
    first = model.head(model.hidden_states(_tensor(model, read), cache=cache)[:, -1:])[0]
    for ids in continuations:
        rest = _logits_after(model, cache, ids[:-1]) if len(ids) > 1 else first[:0]
        yield ids, _read(torch.cat([first, rest]), ids)


def _logits_after(model: DecoderLM, read: KVCache, ids: Sequence[int]) -> Float[Tensor, "ids vocab"]:
    """The logits after each of `ids`, which follow the tokens in `read`.

    They come from a cache of exactly their size, so that no text sees the buffers of another one.
    """
    begin, end = read.length, read.length + len(ids)
    cache = model.new_cache(end)
    cache.put(read, [0], 0, 1)
    slots = torch.arange(begin, end, device=next(model.parameters()).device)
    hidden = model.hidden_states(_tensor(model, ids), cache=cache.at(slots, end, full=True, in_order=True))
    return model.head(hidden)[0]


def _read(logits: Float[Tensor, "ids vocab"], ids: Sequence[int]) -> LogLikelihood:
    """The log-likelihood of `ids` by the logits at their places."""
    targets = torch.tensor(ids, device=logits.device)
    nats = math.fsum(logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist())
    if not math.isfinite(nats):
        raise UserError(
            f"the log-likelihood of a text is {nats}: the weights have diverged, so choose another checkpoint"
        )
    return LogLikelihood(nats, bool((logits.argmax(-1) == targets).all()))


def _tensor(model: DecoderLM, ids: Sequence[int]) -> Int[Tensor, "1 ids"]:
    return torch.tensor([ids], dtype=torch.long, device=next(model.parameters()).device)
