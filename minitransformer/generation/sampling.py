"""Where logits become tokens: requests, each with its own sampling settings and random numbers, and `choose`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.drawing import draw, race_numbers
from minitransformer.generation.logprobs import LogprobRecord
from minitransformer.generation.processors import Processor, at_least_float32, check_finite


def never(token: int) -> bool:
    """The stop condition of a text that only its end-of-text tokens and its length end."""
    return False


@dataclass(eq=False)
class Request:
    """A prompt, how to continue it, and the new tokens so far.

    `stops` is called with each new token, and may end the text. `generator` gives random numbers for this text alone.
    `rules` decide beside `sampling` which tokens are possible. `record` takes down the log-probabilities of its tokens.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    generator: torch.Generator
    ends: Sequence[int] = ()
    stops: Callable[[int], bool] = never
    rules: Sequence[Processor] = ()
    record: LogprobRecord | None = None
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    chosen: int = 0
    """number of new tokens, including those not yet copied to the host"""

    def __post_init__(self) -> None:
        self.processors = self.sampling.make_processors(len(self.prompt), self.ends, self.rules)
        self.looks_back = any(process.looks_back for process in self.processors)
        self._alike = (self.sampling.law, id(self.rules))
        self._text: Tensor | None = None
        self._numbers: Iterator[np.ndarray] | None = None

    @property
    def alike(self) -> tuple[Any, ...]:
        """What requests have in common whose logits are processed together."""
        return (*self._alike, *self.ends, len(self.prompt), self.chosen) if self.looks_back else self._alike

    def text(self, device: torch.device) -> Int[Tensor, "length"]:
        """The prompt and the tokens so far, for processors that look back at them."""
        if self._text is None:
            # One more than fits: a device may be a token ahead of the host.
            room = torch.zeros(self.sampling.max_new_tokens + 1, dtype=torch.long)
            self._text = torch.cat([torch.tensor(self.prompt), room]).to(device)
        return self._text[: len(self.prompt) + self.chosen]

    def numbers(self, vocab: int) -> Float[np.ndarray, "numbers"]:
        """The random numbers of the next token."""
        if self._numbers is None:
            self._numbers = race_numbers(self.generator, vocab)
        return next(self._numbers)

    def note(self, chosen: Int[Tensor, "requests"], row: int) -> None:
        """Add the next token to the text on the device, before the host knows it."""
        if self._text is not None:
            self._text[len(self.prompt) + self.chosen] = chosen[row]

    def append(self, token: int) -> None:
        """Add the next of the chosen tokens, now on the host."""
        self.tokens.append(token)
        stopped = self.stops(token)
        self.done = stopped or token in self.ends or len(self.tokens) == self.sampling.max_new_tokens


def check_prompt(prompt: Sequence[int]) -> None:
    """Raises `UserError` for a prompt without a token, after which nothing can be predicted."""
    if not prompt:
        raise UserError("the prompt has no token: begin with the end-of-text token")


def choose(logits: Float[Tensor, "requests vocab"], requests: Sequence[Request]) -> Int[Tensor, "requests"]:
    """The next token of each request, by its own settings and random numbers.

    Raises `UserError` if a model has gone wrong so far that there is no first token.
    """
    logits = at_least_float32(logits)
    if not all(request.chosen for request in requests):
        check_finite(logits)
    if _all_alike(requests):
        chosen = _choose_alike(logits, requests)
    else:
        chosen = torch.empty(len(requests), dtype=torch.long, device=logits.device)
        for rows in _alike(requests):
            chosen[rows] = _choose_alike(logits[rows], [requests[row] for row in rows])
    for row, request in enumerate(requests):
        if request.looks_back:
            request.note(chosen, row)
        if request.record is not None:
            request.record.note_new(logits[row], chosen[row])
        request.chosen += 1
    return chosen


def _all_alike(requests: Sequence[Request]) -> bool:
    first = requests[0]
    if first.looks_back:
        return len({request.alike for request in requests}) == 1
    return all(request.alike == first.alike for request in requests)


def _alike(requests: Sequence[Request]) -> list[list[int]]:
    """The rows of requests whose logits are processed together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, request in enumerate(requests):
        groups.setdefault(request.alike, []).append(row)
    return list(groups.values())


def _choose_alike(logits: Float[Tensor, "requests vocab"], requests: Sequence[Request]) -> Int[Tensor, "requests"]:
    first, device = requests[0], logits.device
    if first.processors:
        texts = [request.text(device) for request in requests] if first.looks_back else []
        tokens = torch.stack(texts) if texts else torch.empty(len(requests), 0, dtype=torch.long, device=device)
        logits = processed(logits, first.processors, tokens)
    if first.sampling.greedy:
        return logits.argmax(-1)
    numbers = torch.from_numpy(np.array([request.numbers(logits.size(1)) for request in requests]))
    return draw(logits, numbers.to(device, non_blocking=device.type == "cuda"))


def processed(
    logits: Float[Tensor, "samples vocab"], processors: Sequence[Processor], tokens: Int[Tensor, "samples length"]
) -> Float[Tensor, "samples vocab"]:
    """The logits after all processors, in their order."""
    for process in processors:
        logits = process(logits, tokens)
    return logits


def sample_generators(samples: int, generator: torch.Generator) -> list[torch.Generator]:
    """A generator for each sample, the same ones whatever the number of samples."""
    seeds = torch.randint(2**63 - 1, (samples,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seeded(generator: torch.Generator | None, sampling: SamplingConfig) -> torch.Generator:
    """`generator`, by default one on the CPU with the seed of `sampling`, or with a random one if it has none."""
    if generator is None:
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    return generator
