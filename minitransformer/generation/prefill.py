"""Prompts that are read into a cache of their own, a chunk at a time, before their requests are decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minitransformer.architecture.cache import KVCache
from minitransformer.generation.modes import evaluating
from minitransformer.generation.sampling import Request
from minitransformer.models.decoder import DecoderLM


class PromptReading:
    """The tokens of some requests, as many for each; those that are the same are read once."""

    def __init__(self, model: DecoderLM, requests: Sequence[Request], windows: Sequence[Sequence[int]]) -> None:
        self.model, self.requests = model, requests
        rows: dict[tuple[int, ...], int] = {}
        self._row_of = {
            request: rows.setdefault(tuple(window), len(rows))
            for request, window in zip(requests, windows, strict=True)
        }
        self._tokens = torch.tensor(list(rows), dtype=torch.long, device=next(model.parameters()).device)
        self.length = self._tokens.size(1)
        self._cache = model.new_cache(self.length) if self.length else None
        self._read = 0

    @property
    def complete(self) -> bool:
        return self._read == self.length

    def advance(self, most: int) -> int:
        """Read about as many tokens as `most`; returns how many it was."""
        new = min(self.length - self._read, max(1, most // len(self._tokens)))
        with evaluating(self.model):
            self.model.hidden_states(self._tokens.narrow(1, self._read, new), cache=self._cache)
        self._read += new
        return new * len(self._tokens)

    def cache_of(self, requests: Sequence[Request]) -> KVCache | None:
        """What has been read for these requests: a row for each, or one for all alike; None if it is nothing."""
        if self._cache is not None and len(self._tokens) > 1:
            rows = [self._row_of[request] for request in requests]
            self._cache.select(torch.tensor(rows, device=self._tokens.device))
        return self._cache
