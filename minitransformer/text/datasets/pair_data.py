"""Tokenized pairs of texts, and their batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minitransformer.text.datasets.base import BatchShape, PreparedData
from minitransformer.text.datasets.overlap import shared_warning
from minitransformer.text.datasets.pipeline import SPLITS
from minitransformer.text.token_files import TokenPairs, Tokens, count_bytes
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.pair_batches import PairBatch, SequentialPairs, ShuffledPairs


class NumberedBatches(Protocol):
    """Endless batches, each a function of its index."""

    def batch(self, index: int) -> PairBatch: ...


@dataclass(frozen=True)
class PairData(PreparedData):
    """The interface of stored and generated pairs, for training and validation.

    `target_tokenizer` is the same object as `tokenizer` if the sides share one. The folder's name changes with
    the pairs.
    """

    folder: Path
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    validation: TokenPairs
    batch_tokens: int = field(default=2048, kw_only=True)
    """tokens per batch, padding included, on the longer side"""

    @property
    def ends(self) -> tuple[int, int]:
        """The end tokens of sources and targets."""
        return self.tokenizer.pair_framing.suffix[-1], self.target_tokenizer.pair_framing.suffix[-1]

    @abstractmethod
    def training_batches(self, seed: int) -> NumberedBatches:
        """Endless training batches."""

    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        batches, count = self.training_batches(seed), shape.micro_batches
        return [change(batches.batch(step * count + i)) for i in range(count)]

    def ordered_batches(self, split: str, shape: BatchShape | None = None) -> SequentialPairs:
        from minitransformer.text.pair_batches import SequentialPairs  # late: text is prepared before torch is imported

        start = self.target_tokenizer.target_start
        return SequentialPairs(self.pairs(split), self.batch_tokens, *self.ends, start=start)

    @abstractmethod
    def pairs(self, split: str) -> TokenPairs:
        """All of "train" or "validation"."""

    def num_tokens(self, split: str) -> int:
        pairs = self.pairs(split)
        return len(pairs.sources.tokens) + len(pairs.targets.tokens)

    def num_bytes(self, split: str) -> int:
        return count_bytes(self.target_tokenizer, self.targets(split))

    def targets(self, split: str) -> Tokens:
        return self.pairs(split).targets.tokens


@dataclass(frozen=True)
class PreparedPairs(PairData):
    """The token ids of both splits, memory-mapped.

    Of the pairs that are too long for the context, `skipped` were left out and `cut` truncated.
    """

    train: TokenPairs
    skipped: int
    cut: int
    shared: int = 0
    """pairs of validation that also stand in training"""

    def pairs(self, split: str) -> TokenPairs:
        return {"train": self.train, "validation": self.validation}[split]

    def training_batches(self, seed: int) -> ShuffledPairs:
        from minitransformer.text.pair_batches import ShuffledPairs

        return ShuffledPairs(self.train, self.batch_tokens, *self.ends, seed, self.target_tokenizer.target_start)

    def summary(self) -> str:
        """Lines to print, under 80 columns."""
        lines = [vocabularies(self.tokenizer, self.target_tokenizer)]
        lines += [split_line(split, self.pairs(split)) for split in SPLITS]
        if self.shared:
            lines.append(shared_warning(self.shared, len(self.validation), "pairs"))
        if self.skipped or self.cut:
            lines.append(f"too long   {self.skipped:,} pairs skipped, {self.cut:,} cut")
        return "\n".join(lines)


def vocabularies(tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> str:
    """The line of a summary that names the tokenizers."""
    line = f"tokens     {tokenizer.name} tokenizer, {tokenizer.vocab_size:,} tokens"
    if target_tokenizer is tokenizer:
        return f"{line} for both sides"
    return f"{line}; targets: {target_tokenizer.name}, {target_tokenizer.vocab_size:,}"


def split_line(split: str, pairs: TokenPairs) -> str:
    """The summary line for the size of a split."""
    if not len(pairs):
        return f"{split:10} none: overfitting goes unnoticed"
    source, target = len(pairs.sources.tokens), len(pairs.targets.tokens)
    return f"{split:10} {len(pairs):,} pairs of {source:,} and {target:,} tokens"


def framed_but_last(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    """`tokens` [tokens] with their framing except the last token, which batches add."""
    framing = tokenizer.pair_framing
    return tokens if framing.length == 1 else np.array(framing.around(tokens.tolist())[:-1], tokens.dtype)
