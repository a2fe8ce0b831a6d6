"""Prefill: prompts go into a cache of their own, a chunk at a time, before their requests are decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.modes import evaluating
from minitransformer.generation.sampling import Request
from minitransformer.models.decoder import DecoderLM


class PromptPrefill:
    """The tokens of some requests, as many for each; equal prompts are prefilled once."""

    def __init__(self, model: DecoderLM, requests: Sequence[Request], windows: Sequence[Sequence[int]]) -> None:
        self.model, self.requests = model, requests
        rows: dict[tuple[int, ...], int] = {}
        self._row_of = {
            request: rows.setdefault(tuple(window), len(rows))
            for request, window in zip(requests, windows, strict=True)
        }
        self._tokens = torch.tensor(list(rows), dtype=torch.long, device=next(model.parameters()).device)
        self.length = self._tokens.size(1)
        self._cache = model.new_cache(self.length)
        self._logits = torch.empty(0)
        self._read = 0

    @property
    def complete(self) -> bool:
        return self._read == self.length

    def advance(self, most: int) -> int:
        """Prefill about as many tokens as `most`; returns their number."""
        new = min(self.length - self._read, max(1, most // len(self._tokens)))
        with evaluating(self.model):
            hidden = self.model.hidden_states(self._tokens.narrow(1, self._read, new), cache=self._cache)
            self._read += new
            if self.complete:
                self._logits = self.model.head(hidden[:, -1:])[:, 0]
        return new * len(self._tokens)

    def found_for(self, requests: Sequence[Request]) -> tuple[KVCache, Float[Tensor, "requests vocab"]]:
        """The cache of these requests, a row for each or one for all, and the logits of their next tokens."""
        rows = torch.tensor([self._row_of[request] for request in requests], device=self._tokens.device)
        if len(self._tokens) > 1:
            self._cache.select(rows)
        return self._cache, self._logits[rows]
