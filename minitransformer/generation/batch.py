"""Continuous batching: many prompts share one batch, and whoever ends leaves its row to the next that waits.

Yu et al. 2022 (Orca, OSDI), section 3.1: scheduling by iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.cache import KVCache
from minitransformer.errors import UserError
from minitransformer.generation.decode import draw, evaluating, seeded, uniform_draws
from minitransformer.generation.fast.recording import has_fixed_shapes, recorded
from minitransformer.generation.fast.rows import for_single_rows
from minitransformer.generation.processors import (
    LogitsProcessor,
    SamplingConfig,
    at_least_float32,
    check_finite,
    check_no_beams,
)
from minitransformer.generation.readers import slots_visible, window_length
from minitransformer.models.decoder import DecoderLM


class RowsReader:
    """Rows that begin at different times: what each has read ends at the same slot, and begins at its own.

    All rows write to one slot in a step, so that a step has the same shapes whatever the rows have read. Slots before
    the beginning of a row are padding.
    """

    def __init__(self, model: DecoderLM, rows: int, slots: int) -> None:
        self.model = for_single_rows(model)
        self.device = next(model.parameters()).device
        self.fixed = has_fixed_shapes(self.device)
        self.rows, self.slots = rows, slots
        self.cache = model.new_cache(slots)
        self.end, self.starts = 0, [0] * rows
        # Not a method: what knows this, and is kept by it, would wait for a collection of garbage.
        self._read = recorded(partial(_read, self.model, self.cache), model)
        self._marks = torch.empty(slots, device=self.device)

    def length(self, row: int) -> int:
        """How many tokens the row has read."""
        return self.end - self.starts[row]

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        """From here on, the row has read `tokens` and nothing else."""
        if len(tokens) > self.end:
            self._move(len(tokens) - self.end)
        self.starts[row] = self.end - len(tokens)
        if not tokens:
            self.cache.clear(row)
            return
        alone = self.model.new_cache(len(tokens))
        self.model.hidden_states(torch.tensor([tokens], device=self.device), cache=alone)
        self.cache.put(alone, row, self.starts[row], self.rows)

    def __call__(self, tokens: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Every row reads one token; the logits of the next."""
        if self.end == self.slots:
            self._move(-min(self.starts))
        read = torch.tensor([tokens, [self.length(row) for row in range(self.rows)]], device=self.device)
        slot = torch.tensor([self.end], device=self.device)
        self.end += 1
        visible = slots_visible(self.end, self.slots, self.fixed)
        return self._read(read[0, :, None], slot, self._marks[:visible], read[1, :, None])

    def _move(self, by: int) -> None:
        """All that was read lies so many slots further; positions within a row stay."""
        assert by, "a row has more tokens than there are slots"
        self.cache.roll(by)
        self.end, self.starts = self.end + by, [start + by for start in self.starts]


def _read(model: DecoderLM, cache: KVCache, tokens: Tensor, slot: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    # In every row, nothing is later than the one new token.
    chosen = cache.at(slot, visible.size(0), full=False, in_order=True)
    return model.head(model.hidden_states(tokens, positions=positions, cache=chosen)[:, -1])


@dataclass
class _Text:
    """What stands in a row: a prompt and what follows it, with the random numbers of its own."""

    number: int
    tokens: list[int]
    prompt_length: int
    uniform: Float[Tensor, "steps"]
    processors: list[LogitsProcessor]

    @property
    def new(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@torch.inference_mode()
def generate_each(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    batch_size: int,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    over: Callable[[int, int], bool] = lambda number, token: False,
) -> Iterator[tuple[int, list[int]]]:
    """For each prompt, its number and the tokens that follow it, in the order in which they end.

    Each is what `generate` gives for this prompt alone with the same seed, up to the rounding of sums, with one of
    `ends` as its last token if it has come. `over` is told the number and each new token, and may end the text.
    """
    check_no_beams(sampling)
    if not all(prompts):
        raise UserError("a prompt has no token: begin with the end-of-text token")
    context = model.config.context_length
    most = max(map(len, prompts), default=0) + sampling.max_new_tokens
    waiting = iter(enumerate(prompts))
    rows: list[_Text | None] = [None] * min(batch_size, len(prompts))
    with evaluating(model):
        read = RowsReader(model, len(rows), min(most, context))
        while True:
            for row, text in enumerate(rows):
                new = text is None
                if text is None:
                    text = rows[row] = _next_text(waiting, sampling, ends)
                # All but the newest token, which is read with those of the other rows.
                before = 0 if text is None else window_length(len(text.tokens), context) - 1
                if new or before != read.length(row):
                    read.begin(row, [] if text is None else text.tokens[-1 - before : -1])
            if not any(rows):
                return
            logits = read([0 if text is None else text.tokens[-1] for text in rows])[:, :vocab_size]
            for row, token in zip(_active(rows), _choose(logits, rows, sampling), strict=True):
                text = rows[row]
                assert text is not None
                text.tokens.append(token)
                stopped = over(text.number, token)
                if token in ends or stopped or len(text.new) == sampling.max_new_tokens:
                    yield text.number, text.new
                    rows[row] = None


def _next_text(
    waiting: Iterator[tuple[int, Sequence[int]]], sampling: SamplingConfig, ends: Sequence[int]
) -> _Text | None:
    number, prompt = next(waiting, (0, []))
    if not prompt:
        return None
    [uniform] = uniform_draws(1, sampling.max_new_tokens, seeded(None, sampling))
    return _Text(number, list(prompt), len(prompt), uniform, sampling.processors(len(prompt), ends))


def _active(rows: Sequence[_Text | None]) -> list[int]:
    return [row for row, text in enumerate(rows) if text is not None]


def _choose(logits: Float[Tensor, "rows vocab"], rows: Sequence[_Text | None], sampling: SamplingConfig) -> list[int]:
    """The next token of each row that has a text."""
    texts = [text for text in rows if text is not None]
    logits = at_least_float32(logits[_active(rows)])
    if not all(len(text.new) for text in texts):
        check_finite(logits)
    if sampling.looks_back:
        logits = torch.cat([_processed(row[None], text) for row, text in zip(logits, texts, strict=True)])
    else:
        logits = _processed(logits, texts[0])
    if sampling.greedy:
        return logits.argmax(-1).tolist()
    uniform = torch.stack([text.uniform[len(text.new)] for text in texts])
    return draw(logits, uniform.to(logits.device)).tolist()


def _processed(logits: Tensor, text: _Text) -> Tensor:
    tokens = torch.tensor([text.tokens], device=logits.device)
    for process in text.processors:
        logits = process(logits, tokens)
    return logits
