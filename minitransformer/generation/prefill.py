"""Prefill: the forward pass over prompts, a chunk at a time, into a cache of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.logprobs import ROWS_AT_ONCE, LogprobRecord
from minitransformer.generation.modes import evaluating
from minitransformer.generation.prefixes import BLOCK, PrefixCache, common_length
from minitransformer.models.decoder import DecoderLM


class PromptPrefill:
    """The prefill of prompts of one length. What they begin with in common is computed once, or taken from `prefixes`.

    Each of `records`, if there are any, is told of its prompt.
    """

    def __init__(
        self,
        model: DecoderLM,
        prompts: Sequence[Sequence[int]],
        records: Sequence[LogprobRecord | None] = (),
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.model, self._prefixes = model, prefixes
        rows: dict[tuple[int, ...], int] = {}
        self._rows = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
        self._recorded = [
            (row, record) for row, record in zip(self._rows, records, strict=False) if record and record.of_prompt
        ]
        self._prompts = list(rows)
        self._tokens = torch.tensor(self._prompts, dtype=torch.long, device=next(model.parameters()).device)
        self.length = self._tokens.size(1)
        common = common_length(self._prompts)
        self._common = common if len(rows) > 1 and common >= BLOCK else 0
        """how much is computed in one row, for all of them"""
        self._known = min(common, self.length - 1)
        """how much may be known before: the last token is read, for its logits"""
        self._cache = model.new_cache(self.length)
        self._logits = torch.empty(0)
        self._done = 0

    @property
    def complete(self) -> bool:
        return self._done == self.length

    def advance(self, most: int) -> int:
        """Prefill about `most` tokens more; returns their number."""
        if self._done == 0 and self._prefixes is not None and not self._recorded:
            self._done = self._cache.preload(self._prefixes.longest(self._prompts[0][: self._known]))
        in_common = self._done < self._common
        rows = 1 if in_common else len(self._tokens)
        new = min((self._common if in_common else self.length) - self._done, max(1, most // rows))
        if rows > 1 and self._done == self._known >= BLOCK:
            self._cache.select(torch.zeros(rows, dtype=torch.long, device=self._tokens.device))
        with evaluating(self.model):
            tokens = self._tokens[:rows].narrow(1, self._done, new)
            hidden = self.model.hidden_states(tokens, cache=self._cache)
            for row, record in self._recorded:
                self._note(record, hidden[min(row, rows - 1)], row)
            self._done += new
            if self.complete:
                self._logits = self.model.head(hidden[:, -1:])[:, 0]
        if self.complete and self._prefixes is not None:
            for row, prompt in enumerate(self._prompts):
                self._prefixes.keep(prompt, self._cache, row)
        return new * rows

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
