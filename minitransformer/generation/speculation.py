"""Speculative decoding: a draft model proposes several tokens, and the target model verifies them in one forward pass.

The text has exactly the distribution of the target model alone, whatever the draft model proposes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.batch import MakeStep, plain_steps
from minitransformer.generation.config import SamplingConfig, check_no_beams
from minitransformer.generation.logits import CachedLogits
from minitransformer.generation.processors import at_least_float32, check_finite
from minitransformer.generation.sampling import check_prompt, processed, sample_generators, seeded
from minitransformer.generation.window import window_length
from minitransformer.models.decoder import DecoderLM


@dataclass
class Draft:
    """A model that proposes `tokens` tokens at a time for a target model, and how many it proposed so far."""

    model: DecoderLM
    tokens: int = 4
    proposed: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"draft_tokens is {self.tokens}: it must be at least 1")


def accept(
    proposed: Int[Tensor, "proposed"],
    q: Float[Tensor, "proposed vocab"],
    p: Float[Tensor, "proposed_and_one vocab"],
    uniform: Float[Tensor, "proposed_and_one"],
) -> tuple[int, int]:
    """The number of accepted tokens, and the token that follows them: tokens drawn from q become a text drawn from p.

    A proposed token x is accepted with probability min(1, p(x) / q(x)). The first that is rejected is replaced by one
    drawn with weights max(p - q, 0); if none is, a token drawn from the last row of p follows. Leviathan et al. 2023
    (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318), algorithm 2.
    """
    rows = torch.arange(len(proposed), device=proposed.device)
    p_proposed, q_proposed = p[rows, proposed], q[rows, proposed]
    # Not p/q: where p is at least q nothing is rejected, so that a rejection leaves some token with p above q.
    is_accepted = (p_proposed >= q_proposed) | (uniform[:-1] * q_proposed < p_proposed)
    accepted = int(is_accepted.long().cumprod(0).sum())
    weights = p[accepted] if accepted == len(proposed) else _residual(p[accepted], q[accepted])
    return accepted, int(draw_by_weight(weights[None], uniform[-1:]))


def draw_by_weight(
    weights: Float[Tensor, "samples vocab"], uniform: Float[Tensor, "samples"]
) -> Int[Tensor, "samples"]:
    """The token at which the cumulative weight first exceeds the share `uniform` of all: i with probability ∝ wᵢ.

    One random number for each sample, where `torch.multinomial` takes one for each token of the vocabulary.
    """
    cumulative = weights.cumsum(-1)
    # Times the total, which rounding keeps from being 1: below it, so the token found exists and is not impossible.
    share = uniform.unsqueeze(1) * cumulative.narrow(1, -1, 1)
    return torch.searchsorted(cumulative, share, right=True).squeeze(1)


def _residual(p: Float[Tensor, "vocab"], q: Float[Tensor, "vocab"]) -> Float[Tensor, "vocab"]:
    difference = (p - q).clamp(min=0)
    return difference if difference.any() else p  # the two differ by no more than rounding


def speculate(
    model: DecoderLM,
    draft: Draft,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    generator: torch.Generator | None = None,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    make_steps: Callable[[DecoderLM], MakeStep] = plain_steps,
) -> Iterator[Iterator[list[int]]]:
    """For each sample in turn, the tokens that follow `prompt`, a few at a time; its counts are added to `draft`.

    The arguments are those of `generate` and `Engine`, and each sample has the distribution of those of `generate`:
    greedily, it is the same one. Otherwise the same seed gives another text than without a draft, and the same one
    again with the same draft; neither `num_samples` nor `max_new_tokens` changes how it begins. Leave a sample early by
    taking the next. Raises `UserError` where `generate` does, and where the draft has too few tokens.
    """
    check_no_beams(sampling)
    check_prompt(prompt)
    vocab, draft_vocab = vocab_size or model.embedding.table.num_embeddings, draft.model.embedding.table.num_embeddings
    if draft_vocab < vocab:
        raise UserError(
            f"the draft has {draft_vocab} tokens, and the model {vocab}: take a draft with the same tokenizer"
        )
    speculator = _Speculator(model, draft, prompt, sampling, ends, vocab, make_steps)
    for own in sample_generators(sampling.num_samples, seeded(generator, sampling)):
        yield speculator.sample(own)


class _Speculator:
    """The two models after one prompt, which both prefill once for all samples."""

    def __init__(
        self,
        model: DecoderLM,
        draft: Draft,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        ends: Sequence[int],
        vocab_size: int,
        make_steps: Callable[[DecoderLM], MakeStep],
    ) -> None:
        self.draft, self.ends, self.sampling, self.vocab_size = draft, ends, sampling, vocab_size
        self.text_length = model.config.text_length
        most = len(prompt) + sampling.max_new_tokens + draft.tokens
        self.target_logits, self.draft_logits = (CachedLogits(one, 1, most, make_steps) for one in (model, draft.model))
        self.prompt = torch.tensor([prompt], device=next(model.parameters()).device)
        self.processors = sampling.make_processors(len(prompt), ends)
        with torch.inference_mode():
            for logits in (self.target_logits, self.draft_logits):
                check_finite(logits(self.prompt)[:, :vocab_size])

    @torch.inference_mode()
    def sample(self, generator: torch.Generator) -> Iterator[list[int]]:
        """The tokens of one sample, a few at a time, up to the one that ends it or the last that is wanted."""
        tokens, wanted = self.prompt, self.sampling.max_new_tokens
        self._rewind(tokens.size(1))
        while wanted > 0:
            new = self._up_to_an_end(self._round(tokens, generator)[:wanted])
            yield new
            wanted -= wanted if new[-1] in self.ends else len(new)
            tokens = torch.cat([tokens, tokens.new_tensor([new])], dim=1)

    def _up_to_an_end(self, tokens: list[int]) -> list[int]:
        before = list(takewhile(lambda token: token not in self.ends, tokens))
        return tokens[: len(before) + 1]

    def _rewind(self, length: int) -> None:
        self.target_logits.rewind(length)
        self.draft_logits.rewind(length)

    def _round(self, tokens: Int[Tensor, "1 length"], generator: torch.Generator) -> list[int]:
        """The proposed tokens that are accepted, and one more."""
        length, most = tokens.size(1), self.draft.tokens
        # As many random numbers in every round: how a text begins does not depend on where it will be cut.
        uniform = torch.rand(2, most + 1, generator=generator).to(tokens.device)
        # All proposed tokens are verified in one window.
        count = min(most, self.text_length - window_length(length, self.text_length))
        longer, q = self._propose(tokens, uniform[0, :count])
        p = self._verify(longer, count + 1)
        proposed = longer[0, length:]
        accepted, last = accept(proposed, q, p, uniform[1, most - count :])
        self._rewind(length + accepted)
        self.draft.proposed += count
        self.draft.accepted += accepted
        return [*proposed[:accepted].tolist(), last]

    def _propose(
        self, tokens: Int[Tensor, "1 length"], uniform: Float[Tensor, "proposed"]
    ) -> tuple[Int[Tensor, "1 longer"], Float[Tensor, "proposed vocab"]]:
        """The tokens and the proposed ones after them, and the probabilities that these were drawn from."""
        probabilities = [torch.zeros(0, self.vocab_size, device=tokens.device)]
        for number in uniform:
            q = self._probabilities(self.draft_logits(tokens), tokens)
            tokens = torch.cat([tokens, draw_by_weight(q, number[None])[:, None]], dim=1)
            probabilities.append(q)
        return tokens, torch.cat(probabilities)

    def _verify(self, tokens: Int[Tensor, "1 length"], count: int) -> Float[Tensor, "{count} vocab"]:
        """The target's probabilities after each of the newest `count` tokens."""
        logits = self.target_logits.after_each(tokens, count)[0]
        ends = range(tokens.size(1) - count + 1, tokens.size(1) + 1)
        rows = [self._probabilities(row[None], tokens[:, :end]) for row, end in zip(logits, ends, strict=True)]
        return torch.cat(rows)

    def _probabilities(
        self, logits: Float[Tensor, "1 all"], tokens: Int[Tensor, "1 length"]
    ) -> Float[Tensor, "1 vocab"]:
        """The probabilities from which the token after `tokens` is drawn; greedily, the likeliest has all."""
        logits = processed(at_least_float32(logits[:, : self.vocab_size]), self.processors, tokens)
        if self.sampling.greedy:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        return logits.softmax(-1)
