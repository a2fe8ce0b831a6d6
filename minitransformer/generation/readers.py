"""Readers: from all tokens so far to the logits of the next one.

**Past the context.** A decoder sees `context_length` tokens at most. When its window is full, the oldest half is
dropped and the rest is read anew, at positions that start from 0; the window then grows again. Which tokens the window
holds follows from how many there are (`window_length`), whether they were given or generated, so a prompt that is too
long keeps its last tokens by the same rule. Reading anew makes this exact for every position scheme.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.architecture.block import Memory
from minitransformer.architecture.cache import KVCache
from minitransformer.generation.recording import Recorded, for_single_rows, has_hooks
from minitransformer.models.decoder import DecoderLM


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
        return _last_logits(self.model, tokens[:, -window:])

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        pass


class CachedReader:
    """Reads each token once, as long as the window only grows; the first call's tokens are the same in every sample."""

    def __init__(self, model: DecoderLM, max_tokens: int) -> None:
        self.model = for_single_rows(model)
        self.context_length = model.config.context_length
        self.cache = model.new_cache(min(max_tokens, self.context_length))
        self.read = self._read if any(map(has_hooks, model.modules())) else Recorded(self._read)
        self.start: int | None = None

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        samples, total = tokens.shape
        window = window_length(total, self.context_length)
        if self.start is None:
            self.start = total - window
            logits = self._read(tokens[:1, -window:], torch.arange(window, device=tokens.device))
            self.cache.select(torch.zeros(samples, dtype=torch.long, device=tokens.device))
            return logits.expand(samples, -1)
        new = 1 if total - window == self.start else window
        self.start = total - window
        return self.read(tokens[:, -new:], torch.arange(window - new, window, device=tokens.device))

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        self.cache.reorder(rows)

    def _read(self, tokens: Int[Tensor, "samples new"], slots: Int[Tensor, "new"]) -> Float[Tensor, "samples vocab"]:
        self.cache.place(slots)
        return _last_logits(self.model, tokens, self.cache)


def _last_logits(model: DecoderLM, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
    # The head reads the last token only: logits of a whole prompt would be its length times the vocabulary.
    return model.head(model.hidden_states(tokens, cache=cache)[:, -1])


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
