"""Pairs of texts as token ids, and their batches, wherever the pairs come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minitransformer.text.datasets.base import BatchShape, PreparedData
from minitransformer.text.datasets.pipeline import SPLITS
from minitransformer.text.token_files import TokenPairs, Tokens, count_bytes
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.pair_batches import PairBatch, SequentialPairs, ShuffledPairs


class NumberedBatches(Protocol):
    """Batches without end, each a function of its number."""

    def batch(self, index: int) -> PairBatch: ...


@dataclass(frozen=True)
class PairData(PreparedData):
    """Pairs to learn from, whether they lie in a folder or are made up: what training and validation ask of both.

    `target_tokenizer` is the same object as `tokenizer` where the sides share one. The folder's name changes with
    whatever changes the pairs.
    """

    folder: Path
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    validation: TokenPairs
    batch_tokens: int = field(default=2048, kw_only=True)
    """of a batch, padding included, on the side that has more"""

    @property
    def ends(self) -> tuple[int, int]:
        """The last tokens of sources and of targets."""
        return self.tokenizer.pair_framing.after[-1], self.target_tokenizer.pair_framing.after[-1]

    @abstractmethod
    def training_batches(self, seed: int) -> NumberedBatches:
        """Batches without end."""

    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        batches, count = self.training_batches(seed), shape.micro_batches
        return [change(batches.batch(step * count + i)) for i in range(count)]

    def ordered_batches(self, split: str, shape: BatchShape | None = None) -> SequentialPairs:
        from minitransformer.text.pair_batches import SequentialPairs  # late: text is prepared before torch is there

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
    """The token ids of both splits, mapped from disk.

    Of the pairs with a side that is too long for the context, `skipped` are in no split, and `cut` are, shortened.
    """

    train: TokenPairs
    skipped: int
    cut: int

    def pairs(self, split: str) -> TokenPairs:
        return {"train": self.train, "validation": self.validation}[split]

    def training_batches(self, seed: int) -> ShuffledPairs:
        from minitransformer.text.pair_batches import ShuffledPairs

        return ShuffledPairs(self.train, self.batch_tokens, *self.ends, seed, self.target_tokenizer.target_start)

    def summary(self) -> str:
        """Three or four lines to print, of less than 80 columns."""
        lines = [vocabularies(self.tokenizer, self.target_tokenizer)]
        lines += [split_line(split, self.pairs(split)) for split in SPLITS]
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
    """The line of a summary that says how much a split holds."""
    if not len(pairs):
        return f"{split:10} none: nothing tells when training goes too far"
    source, target = len(pairs.sources.tokens), len(pairs.targets.tokens)
    return f"{split:10} {len(pairs):,} pairs of {source:,} and {target:,} tokens"


def framed_but_last(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    """`tokens` [tokens] with all that stands around them but the last token, which batches add."""
    framing = tokenizer.pair_framing
    return tokens if framing.length == 1 else np.array(framing.around(tokens.tolist())[:-1], tokens.dtype)
