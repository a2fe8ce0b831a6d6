"""The engine: many requests share the rows of a batch, and whoever ends leaves its row to the next that waits.

Requests join and leave between any two steps: Yu et al. 2022 (Orca, OSDI), section 3.1. Prompts are prefilled in
chunks between the steps, so that a long one does not stall the others: Agrawal et al. 2023 (SARATHI, arXiv 2308.16369).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.arriving import on_its_way
from minitransformer.generation.batch import MakeStep, Rows, plain_steps
from minitransformer.generation.config import SamplingConfig, check_no_beams
from minitransformer.generation.prefill import PromptPrefill
from minitransformer.generation.readers import window_length
from minitransformer.generation.sampling import (
    Request,
    check_prompt,
    choose,
    never,
    own_generators,
    seeded,
    uniform_numbers,
)
from minitransformer.models.decoder import DecoderLM

CHUNK = 256
"""tokens to prefill between two steps"""
CHUNK_ALONE = 1 << 13
"""while no request is being decoded"""
Arriving = tuple[list[Request], Callable[[], list[int]]]
"""Requests, and what tells the tokens that were chosen for them, when their device is done"""


class Engine:
    """Decodes up to `rows` requests at a time with a cache of `slots` tokens for each, every text as if it were alone.

    Only tokens below `vocab_size` are chosen (default: all that the model has). `make_steps` makes what decodes a token
    of each row. A text that is longer than the context goes on as `window_length` says.
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
    ) -> None:
        self.model, self.vocab_size, self.chunk = model, vocab_size, chunk
        self.context_length = model.config.context_length
        self._rows = Rows(model, rows, min(slots, self.context_length), make_steps)
        self._newest = torch.zeros(rows, dtype=torch.long, device=self._rows.device)
        self._waiting: deque[Request] = deque()
        self._free = list(reversed(range(rows)))
        self._row_of: dict[Request, int] = {}
        self._unread: list[Request] = []
        """requests with a row, but without a prefill"""
        self._prefills: deque[PromptPrefill] = deque()
        self._decoding: list[Request] = []
        self._index: Tensor | None = None
        """the rows that are decoded, if not all"""
        self._arriving: list[Arriving] = []

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        *,
        ends: Sequence[int] = (),
        stops: Callable[[int], bool] = never,
        numbers: torch.Generator | None = None,
    ) -> Request:
        """A request that waits for a row: `prompt` is continued up to one of `ends`, or `max_new_tokens` of `sampling`.

        Its random numbers are those of the first text that `generate` gives with the seed of `sampling`, or `numbers`.
        Raises `UserError` for a prompt without tokens and for a beam search, which follows several texts at a time.
        """
        check_no_beams(sampling)
        check_prompt(prompt)
        needed = min(len(prompt) + sampling.max_new_tokens, self.context_length)
        if needed > self._rows.slots:
            raise UserError(f"a text may have {needed} tokens, and there are {self._rows.slots} slots: give more slots")
        [own] = [numbers] if numbers else own_generators(1, seeded(None, sampling))
        request = Request(prompt, sampling, uniform_numbers(own), ends, stops)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """The request gets no more tokens, and its row is free at once."""
        request.done = True
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._row_of:
            self._leave([request])

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One more token of every request that has been prefilled; nothing while there are only prefills.

        A CUDA device tells the tokens of a step while it works on the next one.
        """
        told = self._tell() if self._unread else []  # a window is made of tokens that are known
        if self._unread or (self._waiting and self._free):
            self._give_rows()
        read = self._prefill() if self._prefills else []
        arriving = [self._decode()] if self._decoding else []
        arriving += [self._begin(prompts) for prompts in read]
        if self._rows.longest() == self.context_length:
            self._prefill_again()
        if self._arriving:
            told += self._tell()
        self._arriving = arriving
        return told if self._newest.is_cuda else self._tell()

    @property
    def idle(self) -> bool:
        """Whether every request has been answered."""
        return not (self._waiting or self._row_of)

    def _give_rows(self) -> None:
        while self._waiting and self._free:
            request = self._waiting.popleft()
            self._row_of[request] = self._free.pop()
            self._unread.append(request)
        groups: dict[int, list[Request]] = {}
        for request in self._unread:
            groups.setdefault(len(self._window(request)), []).append(request)
        for requests in groups.values():
            self._prefills.append(PromptPrefill(self.model, requests, list(map(self._window, requests))))
        self._unread = []

    def _window(self, request: Request) -> list[int]:
        """The tokens that the model sees when it predicts the next one."""
        text = [*request.prompt, *request.tokens]
        return text[-window_length(len(text), self.context_length) :]

    def _prefill(self) -> list[PromptPrefill]:
        """Prefill a chunk, or a whole prompt while no request is being decoded; returns the complete prefills."""
        left = self.chunk
        read: list[PromptPrefill] = []
        while self._prefills and (left > 0 or not (self._decoding or read)):
            prompts = self._prefills[0]
            if not all(request.done for request in prompts.requests):
                left -= prompts.advance(left if self._decoding or read else CHUNK_ALONE)
                if not prompts.complete:
                    continue
                read.append(prompts)
            self._prefills.popleft()
        return read

    def _begin(self, prompts: PromptPrefill) -> Arriving:
        """Choose the first token of requests that have been prefilled: they are decoded from now on."""
        requests = [request for request in prompts.requests if not request.done]
        rows = [self._row_of[request] for request in requests]
        cache, logits = prompts.found_for(requests)
        self._rows.fill(rows, cache, prompts.length)
        chosen = choose(logits[:, : self.vocab_size], requests)
        self._newest[rows] = chosen
        self._decode_from_now_on([*self._decoding, *requests])
        return requests, on_its_way(chosen)

    def _decode_from_now_on(self, requests: list[Request]) -> None:
        self._decoding = sorted(requests, key=self._row_of.__getitem__)
        rows = [self._row_of[request] for request in self._decoding]
        whole = len(rows) == len(self._newest)
        self._index = None if whole else torch.tensor(rows, device=self._newest.device)

    def _decode(self) -> Arriving:
        """Choose the next token of every request that is decoded."""
        requests, index = self._decoding, self._index
        logits = self._rows.decode(self._newest)[:, : self.vocab_size]
        if index is None:
            chosen = self._newest = choose(logits, requests)
        else:
            chosen = choose(logits[index], requests)
            self._newest[index] = chosen
        return requests, on_its_way(chosen)

    def _prefill_again(self) -> None:
        """Where a window is full, what the model sees next is shorter, and at other positions."""
        full = [one for one in self._decoding if self._rows.length(self._row_of[one]) == self.context_length]
        for request in full:
            self._rows.free(self._row_of[request])
        self._unread += full
        self._decode_from_now_on([request for request in self._decoding if request not in full])

    def _tell(self) -> list[tuple[Request, int]]:
        """The tokens that were chosen last, if they have not been told yet; requests that end with one leave."""
        arriving, self._arriving = self._arriving, []
        told = [
            (request, token)
            for requests, wait in arriving
            for request, token in zip(requests, wait(), strict=True)
            if not request.done
        ]
        for request, token in told:
            request.take(token)
        self._leave([request for request, _ in told if request.done])
        return told

    def _leave(self, requests: Sequence[Request]) -> None:
        """The rows of these requests are free."""
        if not requests:
            return
        for request in requests:
            if request in self._decoding:
                self._rows.free(self._row_of[request])
        self._unread = [request for request in self._unread if request not in requests]
        self._decode_from_now_on([request for request in self._decoding if request not in requests])
        self._free += [self._row_of.pop(request) for request in requests]
