"""Speculative decoding: a small model guesses several tokens, and the large one reads them all at once.

What comes out has exactly the distribution of the large model alone, whatever the small one guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.generation.config import SamplingConfig, check_no_beams
from minitransformer.generation.modes import evaluating
from minitransformer.generation.processors import at_least_float32, check_finite
from minitransformer.generation.readers import CachedReader, MakeRead, plain_reads, window_length
from minitransformer.generation.sampling import check_prompt, draw_by_weight, own_generators, processed, seeded
from minitransformer.models.decoder import DecoderLM


@dataclass
class Draft:
    """A model that guesses `tokens` tokens at a time for another one, and how often it was right so far."""

    model: DecoderLM
    tokens: int = 4
    guessed: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"draft_tokens is {self.tokens}: it must be at least 1")


def accept(
    guesses: Int[Tensor, "guesses"],
    q: Float[Tensor, "guesses vocab"],
    p: Float[Tensor, "guesses_and_one vocab"],
    uniform: Float[Tensor, "guesses_and_one"],
) -> tuple[int, int]:
    """How many guesses stand, and the token that follows them: guesses drawn from q become a text drawn from p.

    A guess x stands with probability min(1, p(x) / q(x)). The first that does not is replaced by a token drawn with
    weights max(p - q, 0); if all stand, a token drawn from the last row of p follows. Leviathan et al. 2023 (arXiv
    2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318), algorithm 2.
    """
    rows = torch.arange(len(guesses), device=guesses.device)
    p_guess, q_guess = p[rows, guesses], q[rows, guesses]
    # Not p/q: where p is at least q nothing is rejected, so that a rejection leaves some token with p above q.
    stands = (p_guess >= q_guess) | (uniform[:-1] * q_guess < p_guess)
    standing = int(stands.long().cumprod(0).sum())
    weights = p[standing] if standing == len(guesses) else _rest(p[standing], q[standing])
    return standing, int(draw_by_weight(weights[None], uniform[-1:]))


def _rest(p: Float[Tensor, "vocab"], q: Float[Tensor, "vocab"]) -> Float[Tensor, "vocab"]:
    rest = (p - q).clamp(min=0)
    return rest if rest.any() else p  # the two differ by no more than rounding


def speculate(
    model: DecoderLM,
    draft: Draft,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    generator: torch.Generator | None = None,
    ends: Sequence[int] = (),
    vocab_size: int | None = None,
    make_reads: Callable[[DecoderLM], MakeRead] = plain_reads,
) -> Iterator[Iterator[list[int]]]:
    """For each sample in turn, the tokens that follow `prompt`, a few at a time; its counts are added to `draft`.

    The arguments are those of `generate` and `CachedReader`, and each sample has the distribution of those of
    `generate`: greedily, it is the same one. Otherwise the same seed gives another text than without a draft, and the
    same one again with the same draft; neither `num_samples` nor `max_new_tokens` changes how it begins. Leave a sample
    early by taking the next.
    Raises `UserError` where `generate` does, and where the draft has too few tokens.
    """
    check_no_beams(sampling)
    check_prompt(prompt)
    tokens, drafts = vocab_size or model.embedding.table.num_embeddings, draft.model.embedding.table.num_embeddings
    if drafts < tokens:
        raise UserError(f"the draft has {drafts} tokens, and the model {tokens}: take a draft with the same tokenizer")
    most = len(prompt) + sampling.max_new_tokens + draft.tokens
    target_reader, draft_reader = CachedReader(model, most, make_reads), CachedReader(draft.model, most, make_reads)
    speculator = _Speculator(target_reader, draft_reader, draft, prompt, sampling, ends, tokens)
    for numbers in own_generators(sampling.num_samples, seeded(generator, sampling)):
        yield speculator.sample(numbers)


class _Speculator:
    """The two models beside one prompt, which both read once for all samples."""

    def __init__(
        self,
        target_reader: CachedReader,
        draft_reader: CachedReader,
        draft: Draft,
        prompt: Sequence[int],
        sampling: SamplingConfig,
        ends: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.target_reader, self.draft_reader, self.model = target_reader, draft_reader, target_reader.model
        self.draft, self.ends, self.sampling, self.vocab_size = draft, ends, sampling, vocab_size
        self.prompt = torch.tensor([prompt], device=next(self.model.parameters()).device)
        self.processors = sampling.make_processors(len(prompt), ends)

    @torch.inference_mode()
    def sample(self, numbers: torch.Generator) -> Iterator[list[int]]:
        """The tokens of one sample, a few at a time, up to the one that ends it or the last that is wanted."""
        tokens, wanted = self.prompt, self.sampling.max_new_tokens
        with evaluating(self.model), evaluating(self.draft.model):
            self._begin()
            while wanted > 0:
                new = self._up_to_an_end(self._round(tokens, numbers)[:wanted])
                yield new
                wanted -= wanted if new[-1] in self.ends else len(new)
                tokens = torch.cat([tokens, tokens.new_tensor([new])], dim=1)

    def _up_to_an_end(self, tokens: list[int]) -> list[int]:
        before = list(takewhile(lambda token: token not in self.ends, tokens))
        return tokens[: len(before) + 1]

    def _begin(self) -> None:
        """Both have read the prompt, and nothing else."""
        for reader in (self.target_reader, self.draft_reader):
            if reader.start is None:
                check_finite(reader(self.prompt)[:, : self.vocab_size])
            reader.forget(self.prompt.size(1))

    def _round(self, tokens: Int[Tensor, "1 length"], numbers: torch.Generator) -> list[int]:
        """The guesses that stand and one token more."""
        length, most = tokens.size(1), self.draft.tokens
        # As many numbers in every round: how a text begins does not depend on where it will be cut.
        uniform = torch.rand(2, most + 1, generator=numbers).to(tokens.device)
        # What the large model reads at once, it must see in one window.
        context = self.model.config.context_length
        count = min(most, context - window_length(length, context))
        longer, q = self._guess(tokens, uniform[0, :count])
        p = self._judge(longer, count + 1)
        guesses = longer[0, length:]
        standing, last = accept(guesses, q, p, uniform[1, most - count :])
        for reader in (self.target_reader, self.draft_reader):
            reader.forget(length + standing)
        self.draft.guessed += count
        self.draft.accepted += standing
        return [*guesses[:standing].tolist(), last]

    def _guess(
        self, tokens: Int[Tensor, "1 length"], uniform: Float[Tensor, "guesses"]
    ) -> tuple[Int[Tensor, "1 longer"], Float[Tensor, "guesses vocab"]]:
        """The tokens with guesses behind them, and the probabilities that they were drawn from."""
        drawn_from = [torch.zeros(0, self.vocab_size, device=tokens.device)]
        for number in uniform:
            q = self._probabilities(self.draft_reader(tokens), tokens)
            tokens = torch.cat([tokens, draw_by_weight(q, number[None])[:, None]], dim=1)
            drawn_from.append(q)
        return tokens, torch.cat(drawn_from)

    def _judge(self, tokens: Int[Tensor, "1 length"], count: int) -> Float[Tensor, "{count} vocab"]:
        """The probabilities after each of the newest `count` tokens."""
        logits = self.target_reader.after_each(tokens, count)[0]
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
