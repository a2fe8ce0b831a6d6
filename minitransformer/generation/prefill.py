"""Prefill: the forward pass over prompts, a chunk at a time, into a cache of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.logprobs import ROWS_AT_ONCE, LogprobRecord
from minitransformer.generation.modes import evaluating
from minitransformer.models.decoder import DecoderLM


class PromptPrefill:
    """The prefill of prompts of one length; equal prompts are computed once.

    Each of `records`, if there are any, is told of its prompt.
    """

    def __init__(
        self, model: DecoderLM, prompts: Sequence[Sequence[int]], records: Sequence[LogprobRecord | None] = ()
    ) -> None:
        self.model = model
        rows: dict[tuple[int, ...], int] = {}
        self._rows = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
        self._recorded = [
            (row, record) for row, record in zip(self._rows, records, strict=False) if record and record.of_prompt
        ]
        self._tokens = torch.tensor(list(rows), dtype=torch.long, device=next(model.parameters()).device)
        self.length = self._tokens.size(1)
        self._cache = model.new_cache(self.length)
        self._logits = torch.empty(0)
        self._done = 0

    @property
    def complete(self) -> bool:
        return self._done == self.length

    def advance(self, most: int) -> int:
        """Prefill about `most` tokens more; returns their number."""
        new = min(self.length - self._done, max(1, most // len(self._tokens)))
        with evaluating(self.model):
            hidden = self.model.hidden_states(self._tokens.narrow(1, self._done, new), cache=self._cache)
            for row, record in self._recorded:
                self._note(record, hidden[row], row)
            self._done += new
            if self.complete:
                self._logits = self.model.head(hidden[:, -1:])[:, 0]
        return new * len(self._tokens)

    def _note(self, record: LogprobRecord, hidden: Float[Tensor, "new d_model"], row: int) -> None:
        """Record the tokens of the prompt that these hidden states predict; the virtual ones are no part of it."""
        begin = max(self._done, len(self.model.prefix))
        end = min(self._done + len(hidden), self.length - 1)
        for first in range(begin, end, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, end)
            logits = self.model.head(hidden[None, first - self._done : last - self._done])[0]
            record.note_prompt(logits, self._tokens[row, first + 1 : last + 1])

    def results(self, prompts: Sequence[int]) -> tuple[KVCache, Float[Tensor, "prompts vocab"]]:
        """The cache of these prompts, by number, with a row for each or one for all, and their next logits."""
        rows = torch.tensor([self._rows[prompt] for prompt in prompts], device=self._tokens.device)
        if len(self._tokens) > 1:
            self._cache.select(rows)
        return self._cache, self._logits[rows]
