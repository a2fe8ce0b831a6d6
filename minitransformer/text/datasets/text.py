"""Tokenized running text, in a training and a validation split."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minitransformer.amounts import size
from minitransformer.errors import UserError
from minitransformer.processes import processors
from minitransformer.settings import Chosen
from minitransformer.text.corpora import Corpus, Piece, kind
from minitransformer.text.datasets.base import BatchShape, PreparedData
from minitransformer.text.datasets.overlap import SharedDocuments, shared_warning
from minitransformer.text.datasets.pipeline import SPLITS, Preparation
from minitransformer.text.tables import TABLES
from minitransformer.text.threads import in_order, progress_bar
from minitransformer.text.token_files import Tokens, count_ids, dtype_of, mapped, stored_dtype
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.batches import SequentialWindows

READER = "rows"
# Splitting by document is accepted if validation is between this fraction and this multiple of what was asked.
TOLERANCE = 2.0
HOW = {
    "documents": "split by document",
    "contiguous": "split at one position",
    "given": "validation from separate files",
    "none": "no validation split",
}
"""each way to split a text, in words"""


@dataclass(frozen=True)
class PreparedText(PreparedData):
    """The token ids of both splits, each [tokens], memory-mapped, and their origin.

    Every document starts with the tokenizer's separator: the end-of-text token, and the model's prefix of a
    text. `…_bytes` are UTF-8 bytes of text, without special tokens, so that bits per byte = nats summed over a
    split / ln 2 / its bytes. `split` says how the text was split: by "documents", "contiguous" at one position, "given"
    by separate files, or "none".
    """

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    train_bytes: int
    validation_bytes: int
    train_documents: int
    validation_documents: int
    split: str
    shared_documents: int = 0
    """documents of validation that also stand in training"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_tokenizer", self.tokenizer)

    @property
    def shortest(self) -> int:
        """Number of tokens of the shorter split."""
        return len(self.train) if self.split == "none" else min(len(self.train), len(self.validation))

    @cached_property
    def majority_baseline(self) -> float:
        """Fraction of validation tokens that equal the most frequent training token."""
        most_frequent = count_ids(self.train, self.tokenizer.vocab_size).argmax()
        return float((np.asarray(self.validation) == most_frequent).mean())

    def targets(self, split: str) -> Tokens:
        return {"train": self.train, "validation": self.validation}[split]

    def num_tokens(self, split: str) -> int:
        return len(self.targets(split))

    def num_bytes(self, split: str) -> int:
        return {"train": self.train_bytes, "validation": self.validation_bytes}[split]

    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        from minitransformer.text.batches import ShuffledWindows  # late: text is prepared before torch is imported

        windows = ShuffledWindows(self.train, shape.window, shape.rows * shape.micro_batches, seed)
        micro_batches: list[Any] = change(windows.batch(step)).split(shape.rows)
        return micro_batches

    def ordered_batches(self, split: str, shape: BatchShape) -> SequentialWindows:
        from minitransformer.text.batches import SequentialWindows

        tokens = self.targets(split)
        if shape.whole:
            tokens = tokens[: max(1, (len(tokens) - 1) // shape.window) * shape.window + 1]
        return SequentialWindows(tokens, shape.window, shape.rows, shape.stride)

    def summary(self) -> str:
        """Lines to print, under 80 columns."""
        tokenizer, train = self.tokenizer, size(self.train_bytes)
        lines = [
            f"tokens     {tokenizer.name} tokenizer, {tokenizer.vocab_size:,} tokens, {HOW[self.split]}",
            f"train      {len(self.train):,} tokens from {train}, documents: {self.train_documents:,}",
        ]
        if self.split == "none":
            return "\n".join([*lines, "validation none: overfitting goes unnoticed"])
        validation = f"{len(self.validation):,} tokens from {size(self.validation_bytes)}"
        lines.append(f"validation {validation}, documents: {self.validation_documents:,}")
        if self.shared_documents:
            lines.append(shared_warning(self.shared_documents, self.validation_documents, "documents"))
        return "\n".join(lines)


class TooShort(UserError):
    """Text too short for a window in each split; the longest that fits has `longest` tokens."""

    def __init__(self, message: str, longest: int) -> None:
        super().__init__(message)
        self.longest = longest


@dataclass(frozen=True)
class TextScan:
    """Statistics of a corpus, needed before encoding."""

    digest: str
    documents: int
    characters: int
    bytes: int
    validation_bytes: int
    """size of the documents that `is_validation` selects"""

    def balanced(self, fraction: float) -> bool:
        """Whether splitting by document gives validation about `fraction`; with few documents it may not."""
        share = self.validation_bytes / self.bytes
        return self.documents > 1 and fraction / TOLERANCE <= share <= min(fraction * TOLERANCE, (1 + fraction) / 2)


class Part(NamedTuple):
    """A piece and its split; `opens` also where a split starts inside a document."""

    text: str
    opens: bool
    validation: bool


@dataclass
class TextPreparation(Preparation[Corpus, TextScan, PreparedText]):
    """Tokenize a corpus into two splits, each with at least one window of `context_length` + 1 tokens.

    Missing `special_tokens` are added to the tokenizer, and count in `vocab_size`; it is fitted to the whole
    corpus, validation included. Documents are split by a hash of their beginning, independent of their order
    and repetition. If that fails (a single document; far from `validation_fraction`; a split without
    one window), the first 1 - `validation_fraction` of the characters are for training, the rest for validation, as in
    nanoGPT.
    """

    special_tokens: Sequence[str] = ()

    scan_type = TextScan

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation is not None:
            check_apart(self.corpus, self.validation)
        if self.corpus.skipped and self.progress:
            left_out = f"{self.corpus.skipped:,} of its files without a text suffix are left out"
            print(f"{self.corpus.name}: {left_out}; tables must be named directly or by a glob", file=sys.stderr)

    @property
    def bytes(self) -> int:
        return sum(scan.bytes for scan in self.scans)

    def scan_key(self, corpus: Corpus) -> list[Any]:
        # Old versions read tables as plain text: their scans must not be reused.
        tables = [READER for path in corpus.files if kind(path) in TABLES][:1]
        return [corpus.field, self.validation_fraction, *tables]

    def scan(self, corpus: Corpus, on_read: Callable[[int], object]) -> TextScan:
        digest, documents, characters, size, validation = hashlib.sha256(), 0, 0, 0, 0
        aside = False
        for piece in corpus.pieces(on_read):
            encoded = piece.text.encode()
            if piece.opens:
                documents += 1
                aside = is_validation(piece.text, self.validation_fraction)
                digest.update(b"\xff")  # not in UTF-8, so it separates documents
            digest.update(encoded)
            characters += len(piece.text)
            size += len(encoded)
            validation += len(encoded) * aside
        if not documents:
            raise UserError(f"{corpus.name} is empty: put text there")
        return TextScan(digest.hexdigest(), documents, characters, size, validation)

    def choose_tokenizers(self) -> tuple[Tokenizer]:
        tokenizer = self.tokenizer
        if isinstance(tokenizer, Chosen):
            ordinary = None if self.vocab_size is None else self.vocab_size - len(self.special_tokens)
            digests = [scan.digest for scan in self.scans]
            tokenizer = self.fitted(tokenizer, lambda: [self._texts()], self.bytes, digests, ordinary)
        return (tokenizer.with_special_tokens(self.special_tokens).check_vocab_size(self.vocab_size),)

    def _texts(self) -> Iterator[str]:
        return (piece.text for piece in chain.from_iterable(corpus.pieces() for corpus in self.corpora))

    def divisions(self) -> Sequence[str]:
        if self.validation is not None:
            return ("given",)
        if not self.validation_fraction:
            return ("none",)
        balanced = self.scans[0].balanced(self.validation_fraction)
        return ("documents", "contiguous") if balanced else ("contiguous",)

    def identity(self, division: str) -> list[Any]:
        corpus, *validation = self.scans
        depends = validation[0].digest if validation else self.validation_fraction
        return [corpus.digest, self.tokenizers[0].fingerprint, division, depends]

    def write(self, division: str, folder: Path) -> dict[str, Any]:
        tokenizer = self.tokenizers[0]
        parts = encode_in_order(self.parts(division), tokenizer, self.bytes, self.workers, self.progress)
        shared = SharedDocuments()
        counts = write_splits(_noted(parts, shared), folder)
        return {
            **{"dtype": dtype_of(tokenizer).name, "split": division, "shared_documents": shared.count()},
            **counts,
        }

    def parts(self, division: str) -> Iterator[Part]:
        """The pieces of the text, split by `division`."""
        match division:
            case "documents":
                yield from by_document(self.corpus.pieces(), self.validation_fraction)
            case "contiguous":
                share = int(self.scans[0].characters * (1 - self.validation_fraction))
                yield from contiguous(self.corpus.pieces(), share)
            case _:
                for corpus in self.corpora:
                    yield from (Part(text, opens, corpus is self.validation) for text, opens in corpus.pieces())

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any], tokenizers: Sequence[Tokenizer]) -> PreparedText:
        [tokenizer] = tokenizers
        dtype = stored_dtype(meta["dtype"], tokenizer)
        train, validation = (mapped(folder / f"{split}.bin", dtype, meta[split]["tokens"]) for split in SPLITS)
        counts = {f"{split}_{what}": int(meta[split][what]) for split in SPLITS for what in ("bytes", "documents")}
        counts["shared_documents"] = int(meta.get("shared_documents", 0))  # older folders do not say
        return PreparedText(folder, tokenizer, train, validation, **counts, split=meta["split"])

    def fault(self, prepared: PreparedText) -> TooShort | None:
        if prepared.shortest > self.context_length:
            return None
        short = self.validation if self.validation and len(prepared.train) > self.context_length else self.corpus
        train, validation = f"train has {len(prepared.train)} tokens", f"validation {len(prepared.validation)}"
        both = prepared.split != "none"
        return TooShort(
            f"{short.name} is too short: {train}{f' and {validation}' if both else ''}, but one window needs "
            f"{self.context_length + 1}{' in each' if both else ''}: choose a smaller --context-length, or give more "
            "text",
            longest=prepared.shortest - 1,
        )


def check_apart(corpus: Corpus, validation: Corpus) -> None:
    """Raises `UserError` if a file is in both the training and the validation data."""
    seen = {file.resolve() for file in corpus.files}
    if both := [file for file in validation.files if file.resolve() in seen]:
        raise UserError(f"{both[0]} is in --data and in --validation-data: move it, or leave it out of one of them")


# --- splitting


def is_validation(beginning: str, fraction: float) -> bool:
    """Whether the document with this beginning is for validation, by a hash, so that duplicates are in one split."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def by_document(pieces: Iterable[Piece], fraction: float) -> Iterator[Part]:
    """Split documents by the hash of their first piece."""
    validation = False
    for text, opens in pieces:
        if opens:
            validation = is_validation(text, fraction)
        yield Part(text, opens, validation)


def contiguous(pieces: Iterable[Piece], train_characters: int) -> Iterator[Part]:
    """The first `train_characters` for training, the rest for validation, even within a document."""
    left = train_characters
    begun = False
    for text, opens in pieces:
        first, second = text[:left], text[left:]
        left -= len(first)
        if first:
            yield Part(first, opens, False)
        if second:
            yield Part(second, opens or not begun, True)
            begun = True


# --- encoding


class EncodedPart(NamedTuple):
    tokens: Tokens
    bytes: int
    part: Part


def encode_in_order(
    parts: Iterable[Part], tokenizer: Tokenizer, total: int, workers: int | None = None, progress: bool = True
) -> Iterator[EncodedPart]:
    """The tokens of each part in order, encoded by `workers` threads; `total` bytes of text are expected."""
    dtype = dtype_of(tokenizer)
    start = np.array(tokenizer.separator, dtype)

    def encode(part: Part) -> EncodedPart:
        tokens = tokenizer.encode_array(part.text).astype(dtype)
        return EncodedPart(np.concatenate([start, tokens]) if part.opens else tokens, len(part.text.encode()), part)

    with progress_bar(f"encoding with {tokenizer.name}", total, progress) as bar:
        for encoded in in_order(encode, parts, workers or processors(), lambda part: len(part.text)):
            yield encoded
            bar.update(encoded.bytes)


def _noted(parts: Iterable[EncodedPart], shared: SharedDocuments) -> Iterator[EncodedPart]:
    """`parts`, whose texts are added to `shared` on the way."""
    for encoded in parts:
        shared.add(*encoded.part)
        yield encoded


def write_splits(parts: Iterable[EncodedPart], folder: Path) -> dict[str, dict[str, int]]:
    """Write each split's tokens in order; counts tokens, bytes of text and documents."""
    counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS]
        for tokens, size, part in parts:
            files[part.validation].write(tokens.data)
            count = counts[SPLITS[part.validation]]
            count["tokens"] += len(tokens)
            count["bytes"] += size
            count["documents"] += part.opens
    return counts
