"""Readers: from all tokens so far to the logits of the next one.

**Past the context.** A decoder sees `context_length` tokens at most. When its window is full, the oldest half is
dropped and the rest is read anew, at positions that start from 0; the window then grows again. Which tokens the window
holds follows from how many there are (`window_length`), whether they were given or generated, so a prompt that is too
long keeps its last tokens by the same rule. Reading anew makes this exact for every position scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.architecture.block import Memory
from minitransformer.architecture.cache import ChosenSlots, KVCache
from minitransformer.models.decoder import DecoderLM

ReadStep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From new tokens, their slots, and a tensor with as many numbers as visible slots, to logits"""
MakeRead = Callable[[KVCache, int], ReadStep]
"""From a cache, and how many of the newest tokens to give logits for, to what reads new tokens"""


def window_length(total: int, context_length: int) -> int:
    """How many of `total` tokens, the last ones, a model sees that sees at most `context_length`.

    All of them while they fit. One more than fits, and what remains is half of a full window and the newest token.
    """
    if total <= context_length:
        return total
    after_a_drop = context_length // 2 + 1
    return after_a_drop + (total - context_length - 1) % (context_length + 1 - after_a_drop)


class Reader(Protocol):
    """Reads all tokens so far, and gives the logits of the next one."""

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]: ...

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        """From now on, sample i continues what sample `rows[i]` has been so far."""
        ...


class UncachedReader:
    """Reads the whole window for every token: the meaning of decoding, without its speed."""

    def __init__(self, model: DecoderLM) -> None:
        self.model = model

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        window = window_length(tokens.size(1), self.model.config.context_length)
        return _logits(self.model, tokens[:, -window:], 1)[:, 0]

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        pass


def plain_reads(model: DecoderLM) -> MakeRead:
    """Reads that call `model`, which is in eval mode."""
    return partial(plain_read, model)


def plain_read(model: DecoderLM, cache: KVCache, count: int) -> ReadStep:
    """A read that gives logits after the newest `count` tokens."""
    return partial(read_slots, model, cache, count, True)


def read_slots(
    model: DecoderLM,
    cache: KVCache,
    count: int,
    ends_at_newest: bool,
    tokens: Int[Tensor, "samples new"],
    slots: Int[Tensor, "new"],
    visible: Int[Tensor, "visible"],
) -> Float[Tensor, "samples {count} vocab"]:
    """The logits after `tokens`, whose slots are their positions."""
    # Causality for several new tokens takes a mask: kernels would draw it by a number of keys, which grows.
    newest_alone = ends_at_newest and bool(tokens.size(1) == 1)
    chosen = cache.at(slots, visible.size(0), full=ends_at_newest, in_order=newest_alone)
    return _logits(model, tokens, count, chosen, slots[None])


def _logits(
    model: DecoderLM,
    tokens: Tensor,
    count: int,
    cache: KVCache | ChosenSlots | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    # The head reads the last tokens only: logits of a whole prompt would be its length times the vocabulary.
    return model.head(model.hidden_states(tokens, positions=positions, cache=cache)[:, -count:])


class CachedReader:
    """Reads each token once, as long as the window only grows; the first call's tokens are the same in every sample.

    `make_reads` makes what reads the tokens after those of the first call.
    """

    def __init__(
        self, model: DecoderLM, max_tokens: int, make_reads: Callable[[DecoderLM], MakeRead] = plain_reads
    ) -> None:
        self.model, self._make_reads = model, make_reads
        self.context_length = model.config.context_length
        slots = min(max_tokens, self.context_length)
        self.cache = model.new_cache(slots)
        self.positions = torch.arange(slots, device=next(model.parameters()).device)
        self._make_read: MakeRead | None = None
        self._reads: dict[int, ReadStep] = {}
        self.start: int | None = None
        self.known = 0

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        if self.start is None:
            return self._begin(tokens)
        return self.after_each(tokens, 1).squeeze(1)

    def after_each(self, tokens: Int[Tensor, "samples length"], count: int) -> Float[Tensor, "samples {count} vocab"]:
        """The logits after each of the newest `count` tokens, which the window must hold; not for the first call."""
        total = tokens.size(1)
        window = window_length(total, self.context_length)
        assert count <= window, f"logits after {count} tokens in a window of {window}"
        unread = min(total - self.known, window) if total - window == self.start else window
        new = max(unread, count)
        self.start, self.known = total - window, total
        newest = self.positions.narrow(0, window - new, new)
        return self._read(count)(tokens.narrow(1, total - new, new), newest, self.positions.narrow(0, 0, window))

    def forget(self, length: int) -> None:
        """All but the first `length` tokens may be others from now on.

        Nothing is erased: no token attends to later positions, and what comes there next overwrites them.
        """
        self.known = min(self.known, length)

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        self.cache.reorder(rows)

    def _begin(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        samples, total = tokens.shape
        window = window_length(total, self.context_length)
        self.start, self.known = total - window, total
        logits = _logits(self.model, tokens[:1, -window:], 1, self.cache)
        if samples > 1:
            self.cache.select(torch.zeros(samples, dtype=torch.long, device=tokens.device))
        return logits[:, 0].expand(samples, -1)

    def _read(self, count: int) -> ReadStep:
        if count not in self._reads:
            if self._make_read is None:
                self._make_read = self._make_reads(self.model)  # after the prompt, which need not wait for it
            self._reads[count] = self._make_read(self.cache, count)
        return self._reads[count]


class TargetReader:
    """Reads each token of the targets once, beside the memory of their sources: one row of both for each sample."""

    def __init__(self, model: Any, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.cache = model.new_cache()
        self.read = 0

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        new, self.read = tokens[:, self.read :], tokens.size(1)
        return self.model.head(self.model.hidden_states(new, self.memory, cache=self.cache)[:, -1])

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        self.cache.reorder(rows)
