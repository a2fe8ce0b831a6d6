"""The candidates of multiple-choice items and minimal pairs, scored by a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from minitransformer.errors import UserError
from minitransformer.evaluation.choices import ScoredCandidate, ScoredItem
from minitransformer.generation.likelihoods import Continuation, log_likelihoods
from minitransformer.models.decoder import DecoderLM
from minitransformer.runs.open import Run
from minitransformer.text.choices import ChoiceItem
from minitransformer.text.tokenizers import Tokenizer

ITEMS_AT_ONCE = 256
"""so that texts of one length meet; no score depends on it"""


class ChoiceScorer:
    """A decoder and its tokenizer, which score candidates; raises `UserError` for another model."""

    def __init__(self, model: Any, tokenizer: Tokenizer, cased: Callable[[str], str] = str) -> None:
        if not isinstance(model, DecoderLM):
            raise UserError(
                f"topology {model.config.topology!r} gives no likelihood of a text that follows another: choices need "
                "the run of a decoder"
            )
        self.model, self.tokenizer, self.cased = model, tokenizer, cased

    @classmethod
    def of_run(cls, run: Run, checkpoint: str | None = None, device: str = "cpu") -> ChoiceScorer:
        """The scorer of a run's model."""
        return cls(run.load_model(checkpoint, device), run.tokenizer, run.cased)

    def scored(self, items: Sequence[ChoiceItem]) -> Iterator[ScoredItem]:
        """Each item in turn with its scores, which are the same bits whatever other items there are.

        Raises `UserError` for an item that is longer than the context of the model.
        """
        for begin in range(0, len(items), ITEMS_AT_ONCE):
            some = items[begin : begin + ITEMS_AT_ONCE]
            texts = [self.tokens(item, candidate) for item in some for candidate in item.candidates]
            start = tuple(self.tokenizer.encode_prompt(""))
            alone = [Continuation(start, text.ids) for text in texts]
            nats = [each.nats for each in log_likelihoods(self.model, [*texts, *alone])]
            scored = zip(texts, nats[: len(texts)], nats[len(texts) :], strict=True)
            for item in some:
                candidates = tuple(_candidate(item, each, *next(scored)) for each in item.candidates)
                yield ScoredItem(candidates, item.answer, item.group)

    def tokens(self, item: ChoiceItem, candidate: str) -> Continuation:
        """The ids of the context, and those of the candidate where it stands.

        Both are encoded together. Where tokens go across the boundary, the context ends before them. Raises `UserError`
        for a text longer than the model reads.
        """
        start = self.tokenizer.encode_prompt(self.cased(item.context))
        text = self.cased(item.context + item.continuation(candidate))
        whole = [*self.tokenizer.framing.prefix, *self.tokenizer.encode(text)]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False)))
        if not shared:
            whole, shared = [self.tokenizer.end_of_text, *whole], 1
        if shared == len(whole):
            raise UserError(f"{item.where} has the candidate {candidate!r}, of which the tokenizer leaves nothing")
        most = self.model.config.text_length
        if len(whole) - 1 > most:
            raise UserError(
                f"{item.where} has {len(whole)} tokens with its examples and a candidate, and the model reads {most}: "
                "give fewer examples, or a shorter template"
            )
        return Continuation(tuple(whole[:shared]), tuple(whole[shared:]))


def _candidate(item: ChoiceItem, candidate: str, text: Continuation, nats: float, alone: float) -> ScoredCandidate:
    return ScoredCandidate(nats, len(text.ids), len(candidate.encode()), alone if item.context else None)
