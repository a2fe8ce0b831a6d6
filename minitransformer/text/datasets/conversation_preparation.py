"""Tokenization of conversations, with a mark at each token that an assistant writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minitransformer.errors import UserError
from minitransformer.settings import Chosen
from minitransformer.text.chat_template import ChatTemplate
from minitransformer.text.conversations import ConversationRow
from minitransformer.text.datasets.base import BatchShape, PreparedData
from minitransformer.text.datasets.overlap import shared_warning
from minitransformer.text.datasets.pair_preparation import EncodedPair, PairPreparation, PairScan, place_of
from minitransformer.text.datasets.pipeline import SPLITS
from minitransformer.text.token_files import TokenPairs, Tokens, count_bytes
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.packing import PackedConversations


@dataclass(frozen=True)
class PreparedConversations(PreparedData):
    """The conversations of both splits: the sources are their ids, the targets 1 where the assistant writes.

    Of those that are too long, `skipped` were left out and `cut` truncated. With `packing`, a row holds several.
    """

    folder: Path
    tokenizer: Tokenizer
    validation: TokenPairs
    train: TokenPairs
    skipped: int
    cut: int
    template: ChatTemplate = field(default_factory=lambda: ChatTemplate.named("chatml"))
    packing: bool = True
    shared: int = 0
    """conversations of validation that also stand in training"""

    @property
    def target_tokenizer(self) -> Tokenizer:  # type: ignore[override]
        return self.tokenizer

    def conversations(self, split: str) -> TokenPairs:
        """All of "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[split]

    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        rows, count = self._rows("train", shape), shape.micro_batches
        return [change(rows.shuffled(seed, step * count + i)) for i in range(count)]

    def ordered_batches(self, split: str, shape: BatchShape) -> PackedConversations:
        return self._rows(split, shape)

    def _rows(self, split: str, shape: BatchShape) -> PackedConversations:
        from minitransformer.text.packing import PackedConversations  # late: text is prepared before torch is imported

        return PackedConversations(self.conversations(split), shape.window, shape.rows, self.packing)

    def num_tokens(self, split: str) -> int:
        """Tokens that are read: the last one of a conversation is only predicted."""
        found = self.conversations(split)
        return len(found.sources.tokens) - len(found)

    def num_bytes(self, split: str) -> int:
        return count_bytes(self.tokenizer, self.targets(split))

    def targets(self, split: str) -> Tokens:
        found = self.conversations(split)
        return found.sources.tokens[found.targets.tokens == 1]

    def summary(self) -> str:
        lines = [f"tokens     {self.tokenizer.name} tokenizer, {self.tokenizer.vocab_size:,} tokens"]
        lines.append(f"template   {self.template.origin}")
        for split in SPLITS:
            count, answers = len(self.conversations(split)), len(self.targets(split))
            told = f"{count:,} conversations of {self.num_tokens(split):,} tokens, {answers:,} of them in answers"
            lines.append(f"{split:10} {told if count else 'none: overfitting goes unnoticed'}")
        if self.skipped or self.cut:
            lines.append(f"too long   {self.skipped:,} conversations skipped, {self.cut:,} cut")
        if self.shared:
            lines.append(shared_warning(self.shared, len(self.validation), "conversations"))
        return "\n".join(lines)


@dataclass
class ConversationPreparation(PairPreparation):
    """Tokenize conversations by the template that `make_template` makes for the tokenizer.

    A tokenizer that is fitted gets `special_tokens` too, which count in `vocab_size`.
    A conversation has at most `context_length` + 1 tokens, of which the last is not read. One that has no answer after
    it was cut is left out. Validation has the groups, or the conversations without one, whose hash is low.
    """

    make_template: Callable[[Tokenizer], ChatTemplate] = field(kw_only=True)
    special_tokens: Sequence[str] = ()

    key = ("conversations",)

    def scan_key(self, corpus: Any) -> list[Any]:
        return [corpus.field]

    def scan(self, corpus: Any, on_read: Callable[[int], object]) -> PairScan:
        digest, count, size = hashlib.sha256(), 0, 0
        for conversation in corpus.pairs(on_read):
            count += 1
            for part in conversation.parts:
                digest.update(part.encode() + b"\xff")  # not in UTF-8, so it separates texts
            digest.update(b"\xfe")
            size += _size(conversation)
        return PairScan(digest.hexdigest(), count, (size, 0))

    def choose_tokenizers(self) -> tuple[Tokenizer, ...]:
        chosen = self.tokenizer
        if isinstance(chosen, Chosen):
            ordinary = None if self.vocab_size is None else self.vocab_size - len(self.special_tokens)
            scan = self.scans[0]
            fitted = self.fitted(chosen, lambda: [self._contents()], scan.bytes[0], [scan.digest], ordinary)
            chosen = fitted.with_special_tokens(self.special_tokens)
        return (chosen.check_vocab_size(self.vocab_size),)

    @cached_property
    def template(self) -> ChatTemplate:
        return self.make_template(self.tokenizers[0])

    def _contents(self) -> Iterator[str]:
        corpus: Any = self.corpus
        return (content for conversation in corpus.pairs() for content in conversation.contents)

    def identity(self, division: str) -> list[Any]:
        template = self.template
        return [
            *super().identity(division),
            template.source,
            sorted(template.variables.items()),
            sorted(template.special_tokens.items()),
        ]

    def digest(self, pair: EncodedPair) -> int:
        """That of the ids: conversations of one group have one place."""
        return int.from_bytes(hashlib.blake2b(pair.sides[0].tobytes(), digest_size=8).digest())

    def _fitting(self, pairs: Iterable[EncodedPair], counts: dict[str, int]) -> Iterator[EncodedPair]:
        for pair in pairs:
            _, answers = pair.sides
            has_answer = bool(answers[1:].any())
            if pair.too_long:
                counts[self.too_long if has_answer else "skip"] += 1
            if has_answer and not (pair.too_long and self.too_long == "skip"):
                yield pair

    def _encode(self, conversation: Any) -> EncodedPair:
        """The ids and where the assistant writes them, truncated to the context and the token after it with "cut"."""
        ids, answers = self._ids(conversation)
        room = self.context_length + 1
        sides = np.array([ids, answers], np.uint32)[:, : room if self.too_long == "cut" else None]
        place = place_of((conversation.group,) if conversation.group else conversation.parts)
        return EncodedPair(place, (sides[0], sides[1]), len(ids) > room, _size(conversation))

    def _ids(self, conversation: ConversationRow) -> tuple[list[int], list[bool]]:
        tokenizer = self.tokenizers[0]
        if conversation.messages:
            return self.template.answer_spans(conversation.messages, tokenizer)
        before = tokenizer.framing.prefix or (tokenizer.end_of_text,)
        ids = [*tokenizer.encode(conversation.text), tokenizer.end_of_text]
        return [*before, *ids], [False] * len(before) + [True] * len(ids)

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any], tokenizers: Sequence[Tokenizer]) -> Any:
        old = super().load(folder, meta, tokenizers)
        splits = old.validation, old.train
        return PreparedConversations(folder, old.tokenizer, *splits, old.skipped, old.cut, shared=old.shared)

    def fault(self, prepared: Any) -> UserError | None:
        for split in SPLITS if self.validation is not None or self.validation_fraction else SPLITS[:1]:
            if not len(prepared.conversations(split)):
                found = f"{sum(scan.pairs for scan in self.scans)} conversations, {prepared.skipped} of them too long"
                return UserError(
                    f"{self.corpus.name} leaves no conversation for {split} ({found} for {self.context_length} "
                    "tokens): give more of them or of their groups, or choose a greater --context-length"
                )
        return None


def _size(conversation: ConversationRow) -> int:
    return sum(len(part.encode()) for part in conversation.contents)
