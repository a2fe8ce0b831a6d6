"""What happens to logits before a token is drawn: each processor is one law, registered with its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.registry import Registered
from minitransformer.settings import setting

NEVER = float("-inf")


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision is enough for a model, and not for sums over its vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def check_finite(logits: Tensor) -> None:
    """Raises `UserError` if a model has gone wrong so far that nothing can be drawn."""
    if not logits.isfinite().all():
        raise UserError("the model predicts no finite probabilities: choose an earlier checkpoint")


class Processor(Registered, kind="sampling processor"):
    """A map of the logits of the next token. A registered one is applied to every text that its settings affect.

    Processors are applied in the order of their numbers `order`, first those that may change which token is the most
    likely, then the model's own rules, last those with `keeps_likeliest`. `prompt_length` tokens precede the new ones;
    each of `ends` ends the text. `tokens` are all tokens so far, prompt included, for a processor that `looks_back`;
    otherwise there may be none.
    """

    looks_back: ClassVar[bool] = False
    keeps_likeliest: ClassVar[bool] = False
    """the most likely token stays so: without effect in greedy decoding and beam search"""
    order: ClassVar[int] = 100

    def __init__(self, settings: Any, prompt_length: int = 0, ends: Sequence[int] = ()) -> None:
        self.settings, self.prompt_length, self.ends = settings, prompt_length, ends

    @classmethod
    def has_effect(cls, settings: Any) -> bool:
        """Whether these settings change any logits."""
        return bool(settings != cls.Settings())

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        raise NotImplementedError


class RepetitionPenalty(Processor, name="repetition-penalty"):
    """Logits of tokens that occur already are divided by `penalty` where positive, and multiplied by it where negative.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1; here, as in common use, tokens of the prompt count too,
    and a negative logit becomes smaller as well.
    """

    @dataclass(frozen=True)
    class Settings:
        penalty: float = setting(
            1.0,
            above=0,
            must="above 0 (1 changes nothing)",
            flag="repetition_penalty",
            help="above 1, tokens that have occurred become less likely",
        )

    looks_back = True
    order = 10

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        seen, penalty = logits.gather(-1, tokens), self.settings.penalty
        return logits.scatter(-1, tokens, torch.where(seen > 0, seen / penalty, seen * penalty))


def penalty_setting(name: str, help: str) -> float:
    """A setting from -2 to 2, as in OpenAI's API."""
    value: float = setting(0.0, at_least=-2, at_most=2, flag=name, help=help)
    return value


class PresencePenalty(Processor, name="presence-penalty"):
    """logit - penalty, for each token that was generated already: OpenAI's `presence_penalty`; the prompt is free."""

    @dataclass(frozen=True)
    class Settings:
        penalty: float = penalty_setting(
            "presence_penalty", "above 0, tokens that were generated already become less likely (0 changes nothing)"
        )

    looks_back = True
    order = 12

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        new = tokens[:, self.prompt_length :]
        return logits.scatter(-1, new, logits.gather(-1, new) - self.settings.penalty)


class FrequencyPenalty(Processor, name="frequency-penalty"):
    """logit - penalty · n, for a token that was generated n times already: OpenAI's `frequency_penalty`."""

    @dataclass(frozen=True)
    class Settings:
        penalty: float = penalty_setting(
            "frequency_penalty", "above 0, tokens become less likely each time they are generated (0 changes nothing)"
        )

    looks_back = True
    order = 14

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        new = tokens[:, self.prompt_length :]
        return logits.scatter_add(-1, new, logits.new_full(new.shape, -self.settings.penalty))


class NoRepeatNGram(Processor, name="no-repeat-ngram"):
    """No token that would complete an n-gram which occurred already. Paulus et al. 2017 (arXiv 1705.04304), 2.5."""

    @dataclass(frozen=True)
    class Settings:
        n: int | None = setting(
            None, at_least=1, flag="no_repeat_ngram", help="no sequence of this many tokens occurs twice"
        )

    looks_back = True
    order = 20

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        n = self.settings.n
        if tokens.size(1) < n:
            return logits
        ngrams = tokens.unfold(1, n, 1)  # samples, beginnings, n
        beginning = tokens[:, tokens.size(1) - n + 1 :]
        rows, places = (ngrams[:, :, :-1] == beginning[:, None]).all(-1).nonzero(as_tuple=True)
        forbidden = logits.clone()
        forbidden[rows, ngrams[rows, places, -1]] = NEVER
        return forbidden


class MinLength(Processor, name="min-length"):
    """No token that ends a text before there are `new_tokens` new ones."""

    @dataclass(frozen=True)
    class Settings:
        new_tokens: int = setting(0, at_least=0, flag="min_new_tokens", help="fewest tokens before a text may end")

    looks_back = True
    order = 30

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if not self.ends or tokens.size(1) >= self.prompt_length + self.settings.new_tokens:
            return logits
        return suppressed(logits, self.ends)


class Temperature(Processor, name="temperature"):
    """p ∝ exp(logit / temperature): below 1 the likely become likelier, towards 0 only the likeliest remains."""

    @dataclass(frozen=True)
    class Settings:
        temperature: float = setting(
            0.8,
            at_least=0,
            must="at least 0 (0 takes the likeliest token)",
            flag="temperature",
            help="randomness: 0 always takes the most likely token, 1 samples from the model's distribution",
        )

    keeps_likeliest = True
    order = 10

    @classmethod
    def has_effect(cls, settings: Any) -> bool:
        return bool(settings.temperature != 1)

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        # The highest logit becomes 0, so that no temperature, however small, makes it infinite.
        highest = logits.amax(-1, keepdim=True)
        return (logits - highest) / max(self.settings.temperature, torch.finfo(logits.dtype).tiny)


class TopK(Processor, name="top-k"):
    """Only the `k` likeliest tokens remain, and those as likely as the last of them. Fan et al. 2018 (1805.04833)."""

    @dataclass(frozen=True)
    class Settings:
        k: int | None = setting(None, at_least=1, flag="top_k", help="sample from this many most likely tokens")

    keeps_likeliest = True
    order = 20

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if self.settings.k >= logits.size(-1):
            return logits
        last = logits.topk(self.settings.k, sorted=False).values.amin(-1, keepdim=True)
        return logits.masked_fill(logits < last, NEVER)


class TopP(Processor, name="top-p"):
    """Only the nucleus remains: the smallest set of likeliest tokens whose probability reaches `p`.

    Holtzman et al. 2019 (arXiv 1904.09751), section 3.1. The likeliest token always remains.
    """

    @dataclass(frozen=True)
    class Settings:
        p: float | None = setting(
            None,
            above=0,
            at_most=1,
            flag="top_p",
            help="sample from the fewest most likely tokens with at least this probability together",
        )

    keeps_likeliest = True
    order = 30

    @classmethod
    def has_effect(cls, settings: Any) -> bool:
        return settings.p is not None and settings.p < 1

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # A token is needed if those before it do not reach p yet.
        beyond = probabilities.cumsum(-1) - probabilities >= self.settings.p
        beyond[:, 0] = False
        return logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), NEVER)


class MinP(Processor, name="min-p"):
    """Only tokens remain whose probability is at least `p` > 0 times that of the likeliest.

    Nguyen et al. 2024 (arXiv 2407.01082), section 3.
    """

    @dataclass(frozen=True)
    class Settings:
        p: float | None = setting(
            None,
            at_least=0,
            at_most=1,
            flag="min_p",
            help="sample from tokens with at least this share of the most likely one's probability",
        )

    keeps_likeliest = True
    order = 40

    @classmethod
    def has_effect(cls, settings: Any) -> bool:
        return bool(settings.p)

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        # p ≥ min_p · p_max, in logarithms.
        least = logits.amax(-1, keepdim=True) + math.log(self.settings.p)
        return logits.masked_fill(logits < least, NEVER)


class SuppressTokens(Processor):
    """A rule of the model: none of `tokens`."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.suppressed = tokens

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        return suppressed(logits, self.suppressed)


class LogitBias(Processor):
    """logit + bias for each token of `biases`: a rule of one text."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens, self._biases = list(biases), list(biases.values())

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        index = torch.tensor(self._tokens, device=logits.device)
        return logits.index_add(-1, index, logits.new_tensor(self._biases).expand(len(logits), -1))


class ForceToken(Processor):
    """A rule of the model: after `length` tokens, `token` and no other."""

    looks_back = True

    def __init__(self, length: int, token: int) -> None:
        self.length, self.token = length, token

    def __call__(
        self, logits: Float[Tensor, "samples vocab"], tokens: Int[Tensor, "samples length"]
    ) -> Float[Tensor, "samples vocab"]:
        if tokens.size(1) != self.length:
            return logits
        forced = torch.full_like(logits, NEVER)
        forced[:, self.token] = 0.0
        return forced


def suppressed(logits: Float[Tensor, "samples vocab"], tokens: Sequence[int]) -> Float[Tensor, "samples vocab"]:
    """The logits with a probability of 0 for each of `tokens`."""
    return logits.index_fill(-1, torch.tensor(tokens, device=logits.device), NEVER)
