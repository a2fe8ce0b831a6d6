"""Beam search: several likely beginnings at a time, and of all texts that end, the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitransformer.generation.processors import NEVER, LogitsProcessor
from minitransformer.generation.readers import Reader


@dataclass(frozen=True)
class Hypothesis:
    """New tokens, the one that ends the text included, and their score."""

    tokens: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    read: Reader,
    prompt: Int[Tensor, "texts length"],
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    processors: Sequence[LogitsProcessor] = (),
    ends: Sequence[int],
    vocab_size: int | None = None,
) -> list[list[Hypothesis]]:
    """For each text, `num_beams` continuations, the best first: score = Σ log p / (new tokens)^length_penalty.

    `read` sees texts · num_beams rows, beams of a text side by side. At each step, 2 · num_beams candidates are drawn
    up: those among the first num_beams that end are finished, the best others go on. A text is done when no beam that
    goes on could be better than its worst finished one, if it ended here. Graves 2012 (arXiv 1211.3711), section 3,
    with the scores of Wu et al. 2016 (arXiv 1609.08144), equation 14, in the plainer form that is common now.
    """
    search = _Search(prompt, num_beams, max_new_tokens, length_penalty, ends)
    for _ in range(max_new_tokens):
        log_p = read(search.tokens)[:, :vocab_size].log_softmax(-1)
        for process in processors:
            log_p = process(log_p, search.tokens)
        read.reorder(search.advance(log_p))
        if search.done():
            break
    return search.results()


class _Search:
    """The beams of every text that go on, [texts, beams, …], and those that are finished."""

    def __init__(
        self, prompt: Tensor, num_beams: int, max_new_tokens: int, length_penalty: float, ends: Sequence[int]
    ) -> None:
        texts, self.prompt_length = prompt.shape
        self.num_beams, self.max_new_tokens = num_beams, max_new_tokens
        self.length_penalty, self.ends = length_penalty, torch.tensor(ends, device=prompt.device)
        self.running = prompt[:, None].expand(-1, num_beams, -1)
        # All beams begin alike: only the first one counts until they differ.
        self.scores = torch.full((texts, num_beams), NEVER, device=prompt.device)
        self.scores[:, 0] = 0.0
        self.finished: list[list[Hypothesis]] = [[] for _ in range(texts)]
        self.over = [False] * texts

    @property
    def tokens(self) -> Int[Tensor, "rows length"]:
        return self.running.flatten(0, 1)

    def advance(self, log_p: Float[Tensor, "rows vocab"]) -> Int[Tensor, "rows"]:
        """Take one token more in every beam; returns the rows that the beams now continue."""
        texts, vocab = len(self.finished), log_p.size(-1)
        candidates = self.scores[:, :, None] + log_p.view(texts, self.num_beams, vocab)
        # Of those drawn up, as many may end as there are ends for each beam: enough must be left to go on.
        count = max(2, 1 + len(self.ends)) * self.num_beams
        scores, flat = candidates.flatten(1).topk(min(count, candidates[0].numel()))  # [texts, candidates] both
        beams, tokens = flat // vocab, flat % vocab
        extended = torch.cat([self._gather(self.running, beams), tokens[:, :, None]], dim=-1)
        new_tokens = extended.size(-1) - self.prompt_length
        ends = torch.isin(tokens, self.ends) | (new_tokens == self.max_new_tokens)
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
        """Keep the best of the beams that end, and see which texts are over."""
        penalised = (scores / length**self.length_penalty).tolist()
        for text, place in ends[:, : self.num_beams].nonzero().tolist():
            if not self.over[text] and penalised[text][place] > NEVER:
                tokens = extended[text, place, self.prompt_length :].tolist()
                self.finished[text].append(Hypothesis(tokens, penalised[text][place]))
        going_on = scores.masked_fill(ends, NEVER).amax(-1).tolist()
        for text, hypotheses in enumerate(self.finished):
            hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
            del hypotheses[self.num_beams :]
            if len(hypotheses) == self.num_beams:
                self.over[text] |= going_on[text] / length**self.length_penalty <= hypotheses[-1].score

    def done(self) -> bool:
        return all(self.over)

    def results(self) -> list[list[Hypothesis]]:
        return self.finished
