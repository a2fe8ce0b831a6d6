"""Log-probabilities of the tokens of a text by the model itself, before temperature and any other processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

ROWS_AT_ONCE = 64
"""places in a prompt of which the log-probabilities of the whole vocabulary are in memory"""


class TokenLogprob(NamedTuple):
    """log p(token | tokens before it) in nats, and the likeliest tokens at its place with theirs."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass
class LogprobRecord:
    """The log-probabilities of the new tokens of a text, and if `of_prompt` those of its prompt from the second on.

    For each place, the `alternatives` likeliest tokens are kept beside the one that stands there.
    """

    alternatives: int
    of_prompt: bool = False
    prompt: list[TokenLogprob] = field(default_factory=list)
    new: list[TokenLogprob] = field(default_factory=list)

    def note_prompt(self, logits: Float[Tensor, "places vocab"], tokens: Int[Tensor, "places"]) -> None:
        """Add the next `tokens` of the prompt, which stand where the model predicts `logits`."""
        self.prompt += _logprobs(logits, tokens, self.alternatives)

    def note_new(self, logits: Float[Tensor, "vocab"], token: Int[Tensor, ""]) -> None:
        """Add the next new token."""
        self.new += _logprobs(logits[None], token[None], self.alternatives)


def _logprobs(
    logits: Float[Tensor, "places vocab"], tokens: Int[Tensor, "places"], alternatives: int
) -> list[TokenLogprob]:
    log_p = logits.float().log_softmax(-1)
    own = log_p.gather(-1, tokens[:, None])[:, 0].tolist()
    values, ids = log_p.topk(min(alternatives, log_p.size(-1)))
    return [
        TokenLogprob(token, logprob, list(zip(*likeliest, strict=True)))
        for token, logprob, *likeliest in zip(tokens.tolist(), own, ids.tolist(), values.tolist(), strict=True)
    ]
