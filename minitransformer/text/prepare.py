"""A corpus becomes two memory-mapped files of token ids, once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minitransformer.amounts import size
from minitransformer.errors import UserError
from minitransformer.files import sweep, writing
from minitransformer.records import read_json
from minitransformer.text.corpora import Corpus, Piece
from minitransformer.text.folders import REMEDY, work_folder
from minitransformer.text.preparing import (
    SPLITS,
    Tokens,
    cores,
    dtype_of,
    hash_of,
    in_order,
    kept_tokenizer,
    made,
    mapped,
    progress_bar,
    sample,
    stored_dtype,
)
from minitransformer.text.scanning import FORMAT, Source, check_apart, is_validation, source_of
from minitransformer.text.tokenizers import Tokenizer

HOW = {
    "documents": "split by document",
    "contiguous": "split in one place",
    "given": "validation from files of its own",
    "none": "all to train on",
}
"""each way to divide a text, in words"""


@dataclass(frozen=True)
class PreparedText:
    """The token ids of both splits, each [tokens], mapped from disk, and what they were made from.

    Every document starts with the tokenizer's separator: the end-of-text token, and whatever a model wants before a
    text. `…_bytes` are UTF-8 bytes of text, special tokens counting none, so that bits per byte = nats summed over a
    split / ln 2 / its bytes. `split` says how the text was divided: by "documents", "contiguous" in one place, "given"
    by files of its own, or "none".
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

    @property
    def target_tokenizer(self) -> Tokenizer:
        """The tokenizer of what a model writes."""
        return self.tokenizer

    @property
    def shortest(self) -> int:
        """Tokens of the shorter split, of those that there are."""
        return len(self.train) if self.split == "none" else min(len(self.train), len(self.validation))

    def summary(self) -> str:
        """Three lines to print, of less than 80 columns."""
        how, train, validation = HOW[self.split], size(self.train_bytes), size(self.validation_bytes)
        if self.split == "none":
            return (
                f"tokens     {self.tokenizer.name} tokenizer, {self.tokenizer.vocab_size:,} tokens, {how}\n"
                f"train      {len(self.train):,} tokens from {train}, documents: {self.train_documents:,}\n"
                "validation none: nothing tells when training goes too far"
            )
        return (
            f"tokens     {self.tokenizer.name} tokenizer, {self.tokenizer.vocab_size:,} tokens, {how}\n"
            f"train      {len(self.train):,} tokens from {train}, documents: {self.train_documents:,}\n"
            f"validation {len(self.validation):,} tokens from {validation}, "
            f"documents: {self.validation_documents:,}"
        )


class Part(NamedTuple):
    """A piece, and the split it belongs to; `opens` also where a split begins inside a document."""

    text: str
    opens: bool
    validation: bool


class TooShort(UserError):
    """Text without one window in each of its parts; the longest that would fit has `longest` tokens."""

    def __init__(self, message: str, longest: int) -> None:
        super().__init__(message)
        self.longest = longest


class Encoded(NamedTuple):
    tokens: Tokens
    bytes: int
    part: Part


def prepare(
    corpus: Corpus,
    tokenizer: str | Tokenizer,
    *,
    vocab_size: int | None = None,
    validation: Corpus | None = None,
    validation_fraction: float = 0.1,
    context_length: int,
    special_tokens: Sequence[str] = (),
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> PreparedText:
    """The corpus as token ids, from `cache` (default: the work folder's `prepared/`) if it was prepared before.

    `tokenizer` is a registered name, fitted to the whole corpus with `vocab_size`, or a ready one; it is given
    `special_tokens` where it lacks them, which `vocab_size` counts. With a corpus for `validation`, that is the
    validation split, and all of `corpus` is trained on (a tokenizer is fitted to both); so it is without a validation
    split if `validation_fraction` is 0. Otherwise a document goes to validation if a hash of its beginning says so,
    wherever it stands and however often. Where that is no good (a single document; a share far from
    `validation_fraction`; a side without one window of `context_length` + 1 tokens), the first 1 -
    `validation_fraction` of the characters train and the rest validate, as in nanoGPT. `workers` threads encode
    (default: one per core); tiktoken leaves Python while it works.
    Raises `UserError` for text that is too short, unreadable, or not encodable, and when the disk is full.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: choose one from 0 to below 1, such as 0.1")
    if validation is not None:
        validation_fraction = 0.0
        check_apart(corpus, validation)
    if corpus.skipped and progress:
        left_out = f"{corpus.skipped:,} of its files, without the ending of a text, are left out"
        print(f"{corpus.name}: {left_out}; tables are named one by one, as by a glob", file=sys.stderr)
    cache = work_folder() / "prepared" if cache is None else cache
    with writing(cache, REMEDY):
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache)
        source = source_of(corpus, validation, validation_fraction, cache, progress)
        if isinstance(tokenizer, str):
            ordinary = None if vocab_size is None else vocab_size - len(special_tokens)
            tokenizer = _remembered_fit(source, tokenizer, ordinary, cache, progress)
        tokenizer = tokenizer.with_special_tokens(special_tokens).check_vocab_size(vocab_size)
        for split in source.splits:
            key = hash_of([FORMAT, source.scan.digest, tokenizer.fingerprint, split, source.division])[:16]
            build = partial(_build, source, tokenizer, split, workers=workers, progress=progress)
            prepared = made(cache / key, build, opened)
            if prepared.shortest > context_length:
                return prepared
    short = corpus if validation is None or len(prepared.train) <= context_length else validation
    raise _too_short(short.name, prepared, context_length)


def _too_short(name: str, prepared: PreparedText, context_length: int) -> TooShort:
    train, validation = f"train has {len(prepared.train)} tokens", f"validation {len(prepared.validation)}"
    both = prepared.split != "none"
    return TooShort(
        f"{name} is too short: {train}{f' and {validation}' if both else ''}, but one window needs "
        f"{context_length + 1}{' in each' if both else ''}: choose a smaller --context-length, or give more text",
        longest=prepared.shortest - 1,
    )


# --- fitting


def _remembered_fit(source: Source, name: str, vocab_size: int | None, cache: Path, progress: bool) -> Tokenizer:
    """The tokenizer called `name` for this text, from disk if it was fitted to the same before."""
    digests = [scan.digest for scan in source.scans]
    key = hash_of([FORMAT, *digests, Tokenizer.named(name).name, vocab_size])[:16]

    def fit() -> Tokenizer:
        tokenizer = _fit(source, name, vocab_size, progress)
        source.check_unchanged()
        return tokenizer

    return kept_tokenizer(cache / f"tokenizer-{key}.json", fit)


def _fit(source: Source, name: str, vocab_size: int | None, progress: bool) -> Tokenizer:
    member = Tokenizer.named(name)
    limit = member.fit_limit

    def texts() -> Iterator[str]:
        with progress_bar(f"fitting {name}", sum(corpus.size for corpus in source.corpora), progress) as bar:
            texts = (piece.text for corpus in source.corpora for piece in corpus.pieces(bar.update))
            yield from texts if limit is None else sample(texts, limit / source.bytes)

    if limit and source.bytes > limit and progress:
        print(
            f"fitting {name} to an even sample of {limit / 1e6:.0f} MB of the {source.bytes / 1e6:.0f} MB",
            file=sys.stderr,
        )
    return member.fit(texts, vocab_size)


# --- splitting


def by_document(pieces: Iterable[Piece], fraction: float) -> Iterator[Part]:
    """Each document to the side that the hash of its first piece says."""
    validation = False
    for text, opens in pieces:
        if opens:
            validation = is_validation(text, fraction)
        yield Part(text, opens, validation)


def contiguous(pieces: Iterable[Piece], train_characters: int) -> Iterator[Part]:
    """The first `train_characters` to train, the rest to validation, cutting a document where it must be."""
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


# --- building


def _build(
    source: Source, tokenizer: Tokenizer, split: str, folder: Path, *, workers: int | None, progress: bool
) -> None:
    """Fills `folder` with train.bin, validation.bin, tokenizer.json and meta.json."""
    tokenizer.save(folder / "tokenizer.json")
    counts = _write(_parts(source, split), tokenizer, folder, source.bytes, workers, progress)
    source.check_unchanged()
    assert sum(counts[split]["bytes"] for split in SPLITS) == source.bytes, "the corpus is not what was scanned"
    meta = {"format": FORMAT, "dtype": dtype_of(tokenizer).name, "split": split, **counts}
    (folder / "meta.json").write_text(json.dumps(meta))


def _parts(source: Source, split: str) -> Iterator[Part]:
    """The pieces of the text, divided as `split` says."""
    pieces = source.corpus.pieces()
    match split:
        case "documents":
            yield from by_document(pieces, source.fraction)
        case "contiguous":
            yield from contiguous(pieces, int(source.scan.characters * (1 - source.fraction)))
        case _:
            for corpus in source.corpora:
                yield from (Part(text, opens, corpus is source.validation) for text, opens in corpus.pieces())


def _write(
    parts: Iterable[Part], tokenizer: Tokenizer, folder: Path, total: int, workers: int | None, progress: bool
) -> dict[str, dict[str, int]]:
    """Writes each split's tokens in the order of its parts; counts tokens, bytes of text and documents."""
    dtype = dtype_of(tokenizer)
    start = np.array(tokenizer.separator, dtype)

    def encode(part: Part) -> Encoded:
        tokens = tokenizer.encode_array(part.text).astype(dtype)
        return Encoded(np.concatenate([start, tokens]) if part.opens else tokens, len(part.text.encode()), part)

    counts = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS]
        bar = stack.enter_context(progress_bar(f"encoding with {tokenizer.name}", total, progress))
        for tokens, size, part in in_order(encode, parts, workers or cores(), lambda part: len(part.text)):
            files[part.validation].write(tokens.data)
            count = counts[SPLITS[part.validation]]
            count["tokens"] += len(tokens)
            count["bytes"] += size
            count["documents"] += part.opens
            bar.update(size)
    return counts


# --- opening


def opened(folder: Path) -> PreparedText | None:
    """What `prepare` made in `folder`; None if there is nothing, or something that is not whole."""
    try:
        meta = read_json(folder / "meta.json", REMEDY)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        dtype = stored_dtype(meta["dtype"], tokenizer)
        train, validation = (mapped(folder / f"{split}.bin", dtype, meta[split]["tokens"]) for split in SPLITS)
        counts = {f"{split}_{what}": int(meta[split][what]) for split in SPLITS for what in ("bytes", "documents")}
        return PreparedText(folder, tokenizer, train, validation, **counts, split=meta["split"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
