"""Log-likelihoods of texts: the same bits, whatever else is scored, in which order, and how many at once.

A forward pass holds texts of one length only, so that none is padded: sums over padded keys are other sums. Its number
of rows follows from that length alone, and rows that are left over repeat the first text. A matrix product may use
another kernel for another number of rows, and a row near the edge of a small one may be summed in another order. Hence
no pass has fewer than 65 tokens, except those with a single text, which are the same wherever the text stands.

Measured with torch 2.13 on a CPU with AVX-512, with 1 to 8 threads, for 32 to 4096 features: a row of a float32 product
(MKL) is the same bits at every place and for every number of rows from 12 on, and differs for fewer; a row of a
bfloat16 product (oneDNN) always is. Batched products, fused attention, norms, softmax and activations never depend on
other rows. Beside padded batches of 32 texts, on one core, this took 1.1 times as long in float32 and 1.3 times in
bfloat16 for texts of 8 to 15 tokens (2 and 5 times one by one), and 0.8 times for texts of 100 to 163.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.architecture.feedforward import MixtureOfExperts
from minitransformer.errors import UserError
from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderLM

PASS_TOKENS = 128
"""tokens of a forward pass of several texts, at most: more are hardly faster (measured on a CPU)"""


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
    by_length: dict[int, list[Continuation]] = {}
    for text in dict.fromkeys(texts):
        by_length.setdefault(_checked_length(model, text), []).append(text)
    # Each expert would see a number of tokens that depends on all texts of a pass.
    has_experts = any(isinstance(module, MixtureOfExperts) for module in model.modules())
    found: dict[Continuation, LogLikelihood] = {}
    with evaluating(model):
        for length, group in by_length.items():
            rows = 1 if has_experts else max(1, PASS_TOKENS // length)
            scored = _scored_alone(model, group) if rows == 1 else _scored_together(model, group, rows)
            found.update(scored)
    return [found[text] for text in texts]


def _checked_length(model: DecoderLM, text: Continuation) -> int:
    """The number of tokens that the model reads: all but the last, and its virtual ones."""
    assert min(map(len, text)) > 0, "a context and a text have at least one id each"
    length, most = len(text.context) + len(text.ids) - 1, model.config.text_length
    if length > most:
        raise UserError(
            f"a text of {length + 1} tokens is to be scored, and the model reads {most}: give a shorter prompt, or "
            "fewer examples in it"
        )
    return len(model.prefix) + length


def _scored_together(
    model: DecoderLM, texts: Sequence[Continuation], rows: int
) -> Iterator[tuple[Continuation, LogLikelihood]]:
    """Texts of one length, by passes of `rows` rows."""
    for begin in range(0, len(texts), rows):
        some = texts[begin : begin + rows]
        filled = [*some, *[some[0]] * (rows - len(some))]
        logits = model(_tensor(model, [[*model.prefix, *text.context, *text.ids[:-1]] for text in filled]))
        for row, text in zip(logits, some, strict=False):
            yield text, _read(row[-len(text.ids) :], text.ids)


def _scored_alone(model: DecoderLM, texts: Sequence[Continuation]) -> Iterator[tuple[Continuation, LogLikelihood]]:
    """Each text by itself, after a context that is read once for all texts that continue it."""
    by_context: dict[tuple[int, ...], list[Continuation]] = {}
    for text in texts:
        by_context.setdefault(text.context, []).append(text)
    for context, group in by_context.items():
        read = [*model.prefix, *context]
        cache = model.new_cache(len(read))
        first = model.head(model.hidden_states(_tensor(model, [read]), cache=cache)[:, -1:])[0]
        for text in group:
            rest = _logits_after(model, cache, text.ids[:-1]) if len(text.ids) > 1 else first[:0]
            yield text, _read(torch.cat([first, rest]), text.ids)


def _logits_after(model: DecoderLM, read: KVCache, ids: Sequence[int]) -> Float[Tensor, "ids vocab"]:
    """The logits after each of `ids`, which follow the tokens in `read`.

    They come from a cache of exactly their size, so that no text sees the buffers of another one.
    """
    begin, end = read.length, read.length + len(ids)
    cache = model.new_cache(end)
    cache.put(read, [0], 0, 1)
    slots = torch.arange(begin, end, device=next(model.parameters()).device)
    return model(_tensor(model, [ids]), cache=cache.at(slots, end, full=True, in_order=True))[0]


def _read(logits: Float[Tensor, "ids vocab"], ids: Sequence[int]) -> LogLikelihood:
    """The log-likelihood of `ids` by the logits at their places."""
    targets = torch.tensor(ids, device=logits.device)
    nats = math.fsum(logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist())
    if not math.isfinite(nats):
        raise UserError(f"the log-likelihood of a text is {nats}: the weights diverged, so choose another checkpoint")
    return LogLikelihood(nats, bool((logits.argmax(-1) == targets).all()))


def _tensor(model: DecoderLM, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=next(model.parameters()).device)
