"""Logits of the next token after sequences of one length: with a KV cache, without one, or beside a source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.architecture.block import Memory
from minitransformer.generation.batch import MakeStep, Rows, plain_steps
from minitransformer.generation.prefill import PromptPrefill
from minitransformer.generation.window import window_length
from minitransformer.models.decoder import DecoderLM


class NextLogits(Protocol):
    """From all tokens so far to the logits of the next one."""

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]: ...

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        """From now on, sample i continues the tokens of sample `rows[i]`."""
        ...


class UncachedLogits:
    """A forward pass over the whole window for every token: the definition, without the speed of a cache."""

    def __init__(self, model: DecoderLM) -> None:
        self.model = model

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        window = window_length(tokens.size(1), self.model.config.text_length)
        return self.model.head(self.model.hidden_states(tokens[:, -window:])[:, -1])

    def rewind(self, length: int) -> None:
        pass

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        pass


class CachedLogits:
    """A forward pass over new tokens only, as long as the window grows; `make_steps` is that of `Engine`.

    Sequences of up to `max_tokens` tokens, in `rows` rows, any number of them one after another: see `rewind`.
    """

    def __init__(
        self,
        model: DecoderLM,
        rows: int,
        max_tokens: int,
        make_steps: Callable[[DecoderLM], MakeStep] = plain_steps,
    ) -> None:
        self.model, self.prefix, self.text_length = model, len(model.prefix), model.config.text_length
        self._rows = Rows(model, rows, self.prefix + min(max_tokens, self.text_length), make_steps)
        self._start = 0

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        return self.after_each(tokens, 1)[:, 0]

    def after_each(self, tokens: Int[Tensor, "samples length"], count: int) -> Float[Tensor, "samples {count} vocab"]:
        """The logits after each of the newest `count` tokens, which the window must hold."""
        total = tokens.size(1)
        window = window_length(total, self.text_length)
        assert count <= window, f"logits after {count} tokens in a window of {window}"
        start = total - window
        if self._rows.end == 0 or start != self._start:
            self._start = start
            logits = self._prefill(tokens[:, start : total - count + 1])
            if count == 1:
                return logits[:, None]
        new = max(self.prefix + window - self._rows.end, count)
        self._rows.truncate(self.prefix + window - new)
        return self._rows.decode(tokens.narrow(1, total - new, new), count)

    def rewind(self, length: int) -> None:
        """Only the first `length` tokens stay the same in the next call; 0 begins other sequences."""
        kept = length - self._start
        self._rows.truncate(self.prefix + kept if kept > 0 else 0)

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        self._rows.cache.reorder(rows)

    def _prefill(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        rows = list(range(len(tokens)))
        prompts = [[*self.model.prefix, *row] for row in tokens.tolist()]
        prefill = PromptPrefill(self.model, prompts)
        prefill.advance(sum(map(len, prompts)))
        cache, logits = prefill.results(rows)
        self._rows.clear()
        self._rows.fill(rows, cache, prefill.length)
        return logits


class TargetLogits:
    """A forward pass over new tokens of targets, beside the memory of their sources: one row of both for each."""

    def __init__(self, model: Any, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.cache = model.new_cache()

    def __call__(self, tokens: Int[Tensor, "samples length"]) -> Float[Tensor, "samples vocab"]:
        new = tokens[:, self.cache.length :]
        return self.model.head(self.model.hidden_states(new, self.memory, cache=self.cache)[:, -1])

    def reorder(self, rows: Int[Tensor, "samples"]) -> None:
        self.cache.reorder(rows)
