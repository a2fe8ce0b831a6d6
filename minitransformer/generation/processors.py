"""What happens to logits before a token is drawn: each processor is one law, and a list of them is applied in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.errors import UserError

NEVER = float("-inf")
MOST_NEW_TOKENS = 1_000_000
"""random numbers for all of them are drawn at once"""


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision is enough for a model, and not for sums over its vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_finite(logits: Tensor) -> None:
    """Raises `UserError` if a model has gone wrong so far that nothing can be drawn."""
    if not logits.isfinite().all():
        raise UserError("the model predicts no finite probabilities: choose an earlier checkpoint")


class LogitsProcessor(Protocol):
    """A map of the logits of the next token.

    `tokens` are those before it, the prompt's included, for a processor that `looks_back`; otherwise there may be none.
    """

    looks_back: ClassVar[bool]

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]: ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens that occur already are divided by `penalty` where positive, and multiplied by it where negative.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1; here, as in common use, tokens of the prompt count too,
    and a negative logit becomes smaller as well.
    """

    looks_back: ClassVar[bool] = True
    penalty: float

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        seen = logits.gather(-1, tokens)
        penalised = torch.where(seen > 0, seen / self.penalty, seen * self.penalty)
        return logits.scatter(-1, tokens, penalised)


@dataclass(frozen=True)
class NoRepeatNGram:
    """No token that would complete an n-gram which occurred already. Paulus et al. 2017 (arXiv 1705.04304), 2.5."""

    looks_back: ClassVar[bool] = True
    n: int

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if tokens.size(1) < self.n:
            return logits
        ngrams = tokens.unfold(1, self.n, 1)  # samples, beginnings, n
        beginning = tokens[:, tokens.size(1) - self.n + 1 :]
        rows, places = (ngrams[:, :, :-1] == beginning[:, None]).all(-1).nonzero(as_tuple=True)
        forbidden = logits.clone()
        forbidden[rows, ngrams[rows, places, -1]] = NEVER
        return forbidden


@dataclass(frozen=True)
class MinLength:
    """None of `ends`, which end a text, before there are `length` tokens."""

    looks_back: ClassVar[bool] = True
    length: int
    ends: Sequence[int]

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if tokens.size(1) >= self.length:
            return logits
        return Never(self.ends)(logits, tokens)


@dataclass(frozen=True)
class Never:
    """None of `banned`."""

    looks_back: ClassVar[bool] = False
    banned: Sequence[int]

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        return logits.index_fill(-1, torch.tensor(self.banned, device=logits.device), NEVER)


@dataclass(frozen=True)
class Forced:
    """After `length` tokens, `token` and no other."""

    looks_back: ClassVar[bool] = True
    length: int
    token: int

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if tokens.size(1) != self.length:
            return logits
        forced = torch.full_like(logits, NEVER)
        forced[:, self.token] = 0.0
        return forced


@dataclass(frozen=True)
class Temperature:
    """p ∝ exp(logit / temperature): below 1 the likely become likelier, towards 0 only the likeliest remains."""

    looks_back: ClassVar[bool] = False
    temperature: float

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        # The highest logit becomes 0, so that no temperature, however small, makes it infinite.
        highest = logits.amax(-1, keepdim=True)
        return (logits - highest) / max(self.temperature, torch.finfo(logits.dtype).tiny)


@dataclass(frozen=True)
class TopK:
    """Only the `k` likeliest tokens remain, and those as likely as the last of them. Fan et al. 2018 (1805.04833)."""

    looks_back: ClassVar[bool] = False
    k: int

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if self.k >= logits.size(-1):
            return logits
        last = logits.topk(self.k, sorted=False).values.amin(-1, keepdim=True)
        return logits.masked_fill(logits < last, NEVER)


@dataclass(frozen=True)
class TopP:
    """Only the nucleus remains: the smallest set of likeliest tokens whose probability reaches `p`.

    Holtzman et al. 2019 (arXiv 1904.09751), section 3.1. The likeliest token always remains.
    """

    looks_back: ClassVar[bool] = False
    p: float

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token is needed if those before it do not reach p yet.
        beyond = probabilities.cumsum(-1) - probabilities >= self.p
        beyond[:, 0] = False
        return logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), NEVER)


@dataclass(frozen=True)
class MinP:
    """Only tokens remain whose probability is at least `min_p` > 0 times that of the likeliest.

    Nguyen et al. 2024 (arXiv 2407.01082), section 3.
    """

    looks_back: ClassVar[bool] = False
    min_p: float

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        # p ≥ min_p · p_max, in logarithms.
        least = logits.amax(-1, keepdim=True) + math.log(self.min_p)
        return logits.masked_fill(logits < least, NEVER)


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn, and how many. Raises `UserError` for a value that has no meaning."""

    temperature: float = 0.8
    """how freely to draw: 0 always takes the likeliest token, 1 follows the model"""
    top_k: int | None = None
    """draw among this many likeliest tokens"""
    top_p: float | None = None
    """draw among the fewest likeliest tokens that have this probability together"""
    min_p: float | None = None
    """draw among tokens that have at least this share of the likeliest one's probability"""
    repetition_penalty: float = 1.0
    """above 1, tokens that occurred already become less likely"""
    no_repeat_ngram: int | None = None
    """never write the same sequence of this many tokens twice"""
    min_new_tokens: int = 0
    """fewest tokens before the text may end"""
    max_new_tokens: int = 200
    """most tokens to generate"""
    num_samples: int = 1
    """how many continuations; with several beams, the best ones"""
    num_beams: int = 1
    """beams of a beam search, which takes the likeliest text it finds; 1 is none"""
    length_penalty: float = 1.0
    """beams are compared by log-probability / length to this power: above 0 favours longer texts"""
    early_stopping: Literal["false", "true", "never"] = "false"
    """a search that has num_beams texts ends if no beam is better (false), at once (true), or if none can be (never)"""
    seed: int | None = None
    """the same seed gives the same text (default: another one each time)"""
    stop: tuple[str, ...] = ()
    """text that ends a sample, and is not part of it"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it must be at least 0 (0 takes the likeliest token)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: it must be at least 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: it must be above 0 (1 changes nothing)")
        if self.min_new_tokens < 0:
            raise UserError(f"min_new_tokens is {self.min_new_tokens}: it must be at least 0")
        if self.num_beams > 1 and self.num_samples > self.num_beams:
            raise UserError(f"num_samples {self.num_samples} is more than num_beams {self.num_beams}: lower it")
        if self.max_new_tokens > MOST_NEW_TOKENS:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at most {MOST_NEW_TOKENS:,}")
        for name in ("top_k", "max_new_tokens", "num_samples", "num_beams", "no_repeat_ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}: it must be at least 0 and below 2^63")
        if "" in self.stop:
            raise UserError("a stop string is empty: give the text that should end a sample")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature == 0

    def processors(
        self, prompt_length: int, ends: Sequence[int], rules: Sequence[LogitsProcessor] = ()
    ) -> list[LogitsProcessor]:
        """What these settings do to logits after a prompt of so many tokens, in the order in which users know it.

        `rules` are the model's own: they have the last word on which tokens are possible at all.
        """
        processors: list[LogitsProcessor] = []
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenalty(self.repetition_penalty))
        if self.no_repeat_ngram is not None:
            processors.append(NoRepeatNGram(self.no_repeat_ngram))
        if self.min_new_tokens and ends:
            processors.append(MinLength(prompt_length + self.min_new_tokens, ends))
        processors += rules
        if self.greedy or self.num_beams > 1:
            # The rest changes how likely tokens are, and never which one is the likeliest.
            return processors
        if self.temperature != 1:
            processors.append(Temperature(self.temperature))
        if self.top_k is not None:
            processors.append(TopK(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            processors.append(TopP(self.top_p))
        if self.min_p:
            processors.append(MinP(self.min_p))
        return processors


def check_no_beams(sampling: SamplingConfig) -> None:
    """Raises `UserError` where `sampling` asks for a beam search of what writes one token after the other."""
    if sampling.num_beams > 1:
        raise UserError(f"num_beams is {sampling.num_beams}, and these texts are not searched for: make it 1")
