"""Beam search: the most likely hypotheses are extended together, and the best of those that end are the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.logits import NextLogits
from minitransformer.generation.processors import NEVER, Processor, at_least_float32, check_finite
from minitransformer.generation.sampling import processed


@dataclass(frozen=True)
class Hypothesis:
    """New tokens, including the one that ends the text, and their score."""

    tokens: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    next_logits: NextLogits,
    prompt: Int[Tensor, "texts length"],
    sampling: SamplingConfig,
    *,
    processors: Sequence[Processor] = (),
    ends: Sequence[int],
    vocab_size: int | None = None,
    stops: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[Hypothesis]]:
    """For each text, up to `num_beams` continuations, the best first: score = Σ log p / (new tokens)^length_penalty.

    `next_logits` has texts · num_beams rows, the beams of a text side by side. Of the (1 + ends) · num_beams best
    candidates of a step, at least 2 · num_beams, those among the first num_beams that end are finished, and the best
    others go on. A text with num_beams finished hypotheses is done at once if `early_stopping` is "true"; otherwise,
    when no running beam scores higher than the worst of them, at its current length, or with "never" and a positive
    `length_penalty`, at the greatest that it can reach. Graves 2012 (arXiv 1211.3711), section 3, with the scores of
    Wu et al. 2016 (arXiv 1609.08144), equation 14, without its length constant. Raises `UserError` for logits that are
    not finite.
    """
    search = _Search(prompt, sampling, ends, stops)
    for step in range(sampling.max_new_tokens):
        logits = at_least_float32(next_logits(search.tokens)[:, :vocab_size])
        if step == 0:
            check_finite(logits)
        log_p = processed(logits.log_softmax(-1), processors, search.tokens)
        next_logits.reorder(search.advance(log_p))
        if search.done():
            break
    return search.results()


class _Search:
    """The running beams of every text, [texts, beams, …], and its finished hypotheses."""

    def __init__(
        self,
        prompt: Tensor,
        sampling: SamplingConfig,
        ends: Sequence[int],
        stops: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        texts, self.prompt_length = prompt.shape
        self.sampling, self.num_beams, self.stops = sampling, sampling.num_beams, stops
        self.ends = torch.tensor(ends, device=prompt.device)
        self.running = prompt[:, None].expand(-1, self.num_beams, -1)
        # All beams start equal: only the first one counts in the first step.
        self.scores = torch.full((texts, self.num_beams), NEVER, device=prompt.device)
        self.scores[:, 0] = 0.0
        self.finished: list[list[Hypothesis]] = [[] for _ in range(texts)]
        self.is_done = [False] * texts

    @property
    def tokens(self) -> Int[Tensor, "rows length"]:
        return self.running.flatten(0, 1)

    def advance(self, log_p: Float[Tensor, "rows vocab"]) -> Int[Tensor, "rows"]:
        """Extend every beam by one token; returns the row that each beam now continues."""
        texts, vocab = len(self.finished), log_p.size(-1)
        candidates = self.scores[:, :, None] + log_p.view(texts, self.num_beams, vocab)
        # Each beam has a candidate for each of `ends`: num_beams others must be left to go on.
        count = max(2, 1 + len(self.ends)) * self.num_beams
        scores, flat = candidates.flatten(1).topk(min(count, candidates[0].numel()))  # [texts, candidates] both
        beams, tokens = flat // vocab, flat % vocab
        extended = torch.cat([self._gather(self.running, beams), tokens[:, :, None]], dim=-1)
        new_tokens = extended.size(-1) - self.prompt_length
        ends = torch.isin(tokens, self.ends) | (new_tokens == self.sampling.max_new_tokens)
        if self.stops is not None:
            new = extended[:, :, self.prompt_length :].tolist()
            ends |= torch.tensor([[self.stops(text) for text in beams] for beams in new], device=ends.device)
        self._finish(extended, scores, ends, new_tokens)
        order = scores.masked_fill(ends, NEVER).topk(self.num_beams)
        self.scores = order.values
        self.running = self._gather(extended, order.indices)
        first_rows = torch.arange(0, texts * self.num_beams, self.num_beams, device=flat.device)[:, None]
        return (first_rows + beams.gather(1, order.indices)).flatten()

    @staticmethod
    def _gather(sequences: Tensor, chosen: Int[Tensor, "texts chosen"]) -> Tensor:
        return sequences.gather(1, chosen[:, :, None].expand(-1, -1, sequences.size(-1)))

    def _finish(self, extended: Tensor, scores: Tensor, ends: Bool[Tensor, "texts candidates"], length: int) -> None:
        """Keep the best hypotheses that end, and mark the texts that are done."""
        penalty = self.sampling.length_penalty
        penalised = (scores / length**penalty).tolist()
        for text, place in ends[:, : self.num_beams].nonzero().tolist():
            if not self.is_done[text] and penalised[text][place] > NEVER:
                tokens = extended[text, place, self.prompt_length :].tolist()
                self.finished[text].append(Hypothesis(tokens, penalised[text][place]))
        divisor = self._length_to_compare(length) ** penalty
        running = scores.masked_fill(ends, NEVER).amax(-1).tolist()
        for text, hypotheses in enumerate(self.finished):
            hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
            del hypotheses[self.num_beams :]
            if len(hypotheses) == self.num_beams:
                no_better = running[text] / divisor <= hypotheses[-1].score
                self.is_done[text] |= no_better or self.sampling.early_stopping == "true"
            self.is_done[text] |= running[text] == NEVER

    def _length_to_compare(self, length: int) -> int:
        """The length at which a running beam of `length` new tokens is compared to finished hypotheses."""
        waits = self.sampling.early_stopping == "never" and self.sampling.length_penalty > 0
        return self.sampling.max_new_tokens if waits else length

    def done(self) -> bool:
        return all(self.is_done)

    def results(self) -> list[list[Hypothesis]]:
        return self.finished
