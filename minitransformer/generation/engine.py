"""The engine: requests share the rows of a batch, and the next request in the queue takes a row that becomes free.

Requests join and leave between any two steps: Yu et al. 2022 (Orca, OSDI), section 3.1. Prompts are prefilled in
chunks between the steps, so that a long one does not stall the others: Agrawal et al. 2023 (SARATHI, arXiv 2308.16369).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import torch
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.batch import MakeStep, Rows, plain_steps
from minitransformer.generation.config import SamplingConfig, check_no_beams
from minitransformer.generation.host import start_copy
from minitransformer.generation.logprobs import LogprobRecord
from minitransformer.generation.prefill import PromptPrefill
from minitransformer.generation.prefixes import BLOCK, PrefixCache
from minitransformer.generation.processors import Processor
from minitransformer.generation.sampling import (
    Request,
    check_prompt,
    choose,
    never,
    sample_generators,
    seeded,
)
from minitransformer.generation.window import window_length
from minitransformer.models.decoder import DecoderLM

CHUNK = 256
"""tokens to prefill between two steps"""
CHUNK_ALONE = 1 << 13
"""while no request is being decoded"""
InFlight = tuple[list[Request], Callable[[], list[int]]]
"""Requests, and a function that waits for the copy of their next tokens to the host, and returns them"""


class Engine:
    """Decodes up to `rows` requests at a time with a cache of `slots` tokens for each, every text as if it were alone.

    Only tokens below `vocab_size` are chosen (default: all that the model has). `make_steps` makes the decode steps. A
    text that is longer than the context goes on as `window_length` says. With `prefix_tokens`, beginnings of
    prompts are kept, of so many tokens, and read once.
    """

    def __init__(
        self,
        model: DecoderLM,
        rows: int,
        slots: int,
        *,
        vocab_size: int | None = None,
        make_steps: Callable[[DecoderLM], MakeStep] = plain_steps,
        chunk: int = CHUNK,
        prefix_tokens: int = 0,
    ) -> None:
        self.model, self.vocab_size, self.chunk = model, vocab_size, chunk
        self.context_length, self.prefix = model.config.context_length, list(model.prefix)
        self._rows = Rows(model, rows, min(len(self.prefix) + slots, self.context_length), make_steps)
        self.prefixes = PrefixCache(prefix_tokens) if prefix_tokens else None
        self._newest = torch.zeros(rows, dtype=torch.long, device=self._rows.device)
        self._queue: deque[Request] = deque()
        self._free = list(range(rows))
        """a heap: the first rows are taken first, so that few are computed for few requests"""
        self._row_of: dict[Request, int] = {}
        self._to_prefill: list[Request] = []
        """requests with a row, but without a prefill"""
        self._prefills: deque[tuple[list[Request], PromptPrefill]] = deque()
        self._decoding: list[Request] = []
        self._index: Tensor | None = None
        """the rows that are decoded, if not all that are computed"""
        self._computed = 0
        """rows that are computed, from the first: few sizes, each of which has a recording of its own"""
        self._in_flight: list[InFlight] = []

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        *,
        ends: Sequence[int] = (),
        stops: Callable[[int], bool] = never,
        generator: torch.Generator | None = None,
        rules: Sequence[Processor] = (),
        record: LogprobRecord | None = None,
    ) -> Request:
        """Queue a request: continue `prompt` up to one of `ends`, or by `max_new_tokens` of `sampling`.

        Its random numbers come from `generator`, by default those of the first text of `generate` with the same seed.
        `rules` and `record` are those of `Request`.
        Raises `UserError` for a prompt without tokens, for one without enough slots, and for a beam search.
        """
        check_no_beams(sampling)
        check_prompt(prompt)
        needed = min(len(self.prefix) + len(prompt) + sampling.max_new_tokens, self.context_length)
        if needed > self._rows.slots:
            raise UserError(f"a text may have {needed} tokens, and there are {self._rows.slots} slots: give more slots")
        [own] = [generator] if generator else sample_generators(1, seeded(None, sampling))
        request = Request(prompt, sampling, own, ends, stops, rules, record)
        self._queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """The request gets no more tokens, and its row is free at once."""
        request.done = True
        if request in self._queue:
            self._queue.remove(request)
        elif request in self._row_of:
            self._release([request])

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One more token of every request that has been prefilled; nothing while there are only prefills.

        On a CUDA device, the tokens are those of the step before, as it computes this one.
        """
        tokens = self._collect() if self._to_prefill else []  # a window is made of tokens that are known
        if self._to_prefill or (self._queue and self._free):
            self._assign_rows()
        prefilled = self._advance_prefills() if self._prefills else []
        in_flight = [self._decode()] if self._decoding else []
        in_flight += [self._start_decoding(requests, prefill) for requests, prefill in prefilled]
        if self._rows.longest() == self.context_length:
            self._prefill_again()
        if self._in_flight:
            tokens += self._collect()
        self._in_flight = in_flight
        return tokens if self._newest.is_cuda else self._collect()

    @property
    def idle(self) -> bool:
        """Whether every request has been answered."""
        return not (self._queue or self._row_of)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens whose keys and values are held, for texts that are decoded and for prompts to come."""
        kept = self.prefixes.num_tokens if self.prefixes else 0
        return kept + sum(self._rows.end - start for start in list(self._rows.starts.values()))

    def _assign_rows(self) -> None:
        while self._queue and self._free:
            request = self._queue.popleft()
            self._row_of[request] = heappop(self._free)
            self._to_prefill.append(request)
        together: dict[tuple[int, ...], list[Request]] = {}
        for request in self._to_prefill:
            window = self._window(request)
            beginning = window[:BLOCK] if self.prefixes and len(window) > BLOCK else ()
            together.setdefault((len(window), *beginning), []).append(request)
        for requests in together.values():
            self._prefills.append((requests, self._prefill_of(requests)))
        self._to_prefill = []

    def _prefill_of(self, requests: Sequence[Request]) -> PromptPrefill:
        # What is prefilled again, because its window was full, was recorded before, and is the beginning of no prompt.
        records = [request.record if not request.tokens else None for request in requests]
        prefixes = None if any(request.tokens for request in requests) else self.prefixes
        return PromptPrefill(self.model, list(map(self._window, requests)), records, prefixes)

    def _window(self, request: Request) -> list[int]:
        """The tokens that the model sees when it predicts the next one."""
        text = [*request.prompt, *request.tokens]
        return self.prefix + text[-window_length(len(text), self.context_length - len(self.prefix)) :]

    def _advance_prefills(self) -> list[tuple[list[Request], PromptPrefill]]:
        """PromptPrefill a chunk, or a whole prompt while no request is being decoded; returns the complete prefills."""
        left = self.chunk
        complete: list[tuple[list[Request], PromptPrefill]] = []
        while self._prefills and (left > 0 or not (self._decoding or complete)):
            requests, prefill = self._prefills[0]
            if not all(request.done for request in requests):
                left -= prefill.advance(left if self._decoding or complete else CHUNK_ALONE)
                if not prefill.complete:
                    if left <= 0:  # the others have their turn before it is read further
                        self._prefills.rotate(-1)
                    continue
                complete.append((requests, prefill))
            self._prefills.popleft()
        return complete

    def _start_decoding(self, requests: list[Request], prefill: PromptPrefill) -> InFlight:
        """Choose the first token of requests that have been prefilled, and decode them from the next step on."""
        places = [place for place, request in enumerate(requests) if not request.done]
        requests = [requests[place] for place in places]
        rows = [self._row_of[request] for request in requests]
        cache, logits = prefill.results(places)
        self._rows.fill(rows, cache, prefill.length)
        chosen = choose(logits[:, : self.vocab_size], requests)
        self._newest[rows] = chosen
        self._set_decoding([*self._decoding, *requests])
        return requests, start_copy(chosen)

    def _set_decoding(self, requests: list[Request]) -> None:
        self._decoding = sorted(requests, key=self._row_of.__getitem__)
        rows = [self._row_of[request] for request in self._decoding]
        last = max(rows, default=0)
        self._computed = min(1 << last.bit_length(), len(self._newest))
        whole = len(rows) == self._computed
        self._index = None if whole else torch.tensor(rows, device=self._newest.device)

    def _decode(self) -> InFlight:
        """Choose the next token of every request that is decoded."""
        requests, index = self._decoding, self._index
        logits = self._rows.decode(self._newest[: self._computed, None])[:, 0, : self.vocab_size]
        if index is None:
            chosen = self._newest[: self._computed] = choose(logits, requests)
        else:
            chosen = choose(logits[index], requests)
            self._newest[index] = chosen
        return requests, start_copy(chosen)

    def _prefill_again(self) -> None:
        """Where a window is full, what the model sees next is shorter, and at other positions."""
        full = [one for one in self._decoding if self._rows.length(self._row_of[one]) == self.context_length]
        for request in full:
            self._rows.free(self._row_of[request])
        self._to_prefill += full
        self._set_decoding([request for request in self._decoding if request not in full])

    def _collect(self) -> list[tuple[Request, int]]:
        """Wait for the tokens in flight; requests that end with one are released."""
        in_flight, self._in_flight = self._in_flight, []
        tokens = [
            (request, token)
            for requests, wait in in_flight
            for request, token in zip(requests, wait(), strict=True)
            if not request.done
        ]
        for request, token in tokens:
            request.append(token)
        self._release([request for request, _ in tokens if request.done])
        return tokens

    def _release(self, requests: Sequence[Request]) -> None:
        """Free the rows of these requests."""
        if not requests:
            return
        for request in requests:
            if request in self._decoding:
                self._rows.free(self._row_of[request])
        self._to_prefill = [request for request in self._to_prefill if request not in requests]
        self._set_decoding([request for request in self._decoding if request not in requests])
        for request in requests:
            heappush(self._free, self._row_of.pop(request))
