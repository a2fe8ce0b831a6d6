"""A corpus becomes two memory-mapped files of token ids, once."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minitransformer.errors import UserError
from minitransformer.files import locked, sweep, whole_file, writing
from minitransformer.records import read_json, remembered
from minitransformer.text.corpora import Corpus, Piece, Signature
from minitransformer.text.folders import REMEDY, work_folder
from minitransformer.text.preparing import (
    SPLITS,
    Tokens,
    check_unchanged,
    cores,
    dtype_of,
    hash_of,
    in_order,
    made,
    mapped,
    progress_bar,
    sample,
    stored_dtype,
)
from minitransformer.text.tokenizers import Tokenizer

FORMAT = 1
# The division by document stands if validation is at least this part, and at most this multiple, of what was asked.
TOLERANCE = 2.0


@dataclass(frozen=True)
class PreparedText:
    """The token ids of both splits, each [tokens], mapped from disk, and what they were made from.

    Every document starts with the tokenizer's separator: the end-of-text token, and whatever a model wants before a
    text. `…_bytes` are UTF-8 bytes of text, special tokens
    counting none, so that bits per byte = nats summed over a split / ln 2 / its bytes. `split` says how the
    text was divided: by "documents", or "contiguous" in one place.
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

    def summary(self) -> str:
        """Three lines to print, of less than 80 columns."""
        how = {"documents": "split by document", "contiguous": "split in one place"}[self.split]
        train, validation = self.train_bytes / 1e6, self.validation_bytes / 1e6
        return (
            f"tokens     {self.tokenizer.name} tokenizer, {self.tokenizer.vocab_size:,} tokens, {how}\n"
            f"train      {len(self.train):,} tokens from {train:.1f} MB, documents: {self.train_documents:,}\n"
            f"validation {len(self.validation):,} tokens from {validation:.1f} MB, "
            f"documents: {self.validation_documents:,}"
        )


@dataclass(frozen=True)
class Scan:
    """What must be known of a corpus before it is encoded."""

    digest: str
    documents: int
    characters: int
    bytes: int
    validation_bytes: int
    """of the documents that `is_validation` picks"""

    def balanced(self, fraction: float) -> bool:
        """Whether dividing by document gives validation about its share; with few documents it may not."""
        share = self.validation_bytes / self.bytes
        return self.documents > 1 and fraction / TOLERANCE <= share <= min(fraction * TOLERANCE, (1 + fraction) / 2)


class Part(NamedTuple):
    """A piece, and the split it belongs to; `opens` also where a split begins inside a document."""

    text: str
    opens: bool
    validation: bool


class Encoded(NamedTuple):
    tokens: Tokens
    bytes: int
    part: Part


def prepare(
    corpus: Corpus,
    tokenizer: str | Tokenizer,
    *,
    vocab_size: int | None = None,
    validation_fraction: float = 0.1,
    context_length: int,
    special_tokens: Sequence[str] = (),
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> PreparedText:
    """The corpus as token ids, from `cache` (default: the work folder's `prepared/`) if it was prepared before.

    `tokenizer` is a registered name, fitted to the whole corpus with `vocab_size`, or a ready one; it is given
    `special_tokens` where it lacks them, which `vocab_size` counts. A document goes to
    validation if a hash of its beginning says so, wherever it stands and however often. Where that is no
    good (a single document; a share far from `validation_fraction`; a side without one window of
    `context_length` + 1 tokens), the first 1 - `validation_fraction` of the characters train and the rest validate,
    as in nanoGPT. `workers` threads encode (default: one per core); tiktoken leaves Python while it works.
    Raises `UserError` for text that is too short, unreadable, or not encodable, and when the disk is full.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: choose one between 0 and 1, such as 0.1")
    cache = work_folder() / "prepared" if cache is None else cache
    with writing(cache, REMEDY):
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache)
        signature = corpus.signature()
        scan = _remembered_scan(corpus, signature, validation_fraction, cache, progress)
        if isinstance(tokenizer, str):
            ordinary = None if vocab_size is None else vocab_size - len(special_tokens)
            tokenizer = _remembered_fit(corpus, signature, scan, tokenizer, ordinary, cache, progress)
        tokenizer = tokenizer.with_special_tokens(special_tokens).check_vocab_size(vocab_size)
        for split in ("documents", "contiguous") if scan.balanced(validation_fraction) else ("contiguous",):
            key = hash_of([FORMAT, scan.digest, tokenizer.fingerprint, split, validation_fraction])[:16]
            build = partial(
                _build,
                corpus,
                signature,
                scan,
                tokenizer,
                split,
                validation_fraction,
                workers=workers,
                progress=progress,
            )
            prepared = made(cache / key, build, opened)
            if min(len(prepared.train), len(prepared.validation)) > context_length:
                return prepared
    raise UserError(
        f"{corpus.name} is too short: train has {len(prepared.train)} tokens and validation {len(prepared.validation)}"
        f", but one window needs {context_length + 1} in each: choose a smaller --context-length, or give more text"
    )


def is_validation(beginning: str, fraction: float) -> bool:
    """The side of the document that begins so: a hash, so duplicates stay together and order does not matter."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


# --- scanning


def _remembered_scan(corpus: Corpus, signature: Signature, fraction: float, cache: Path, progress: bool) -> Scan:
    """The scan of these files in this state, from disk if they were scanned before."""
    note = cache / f"scan-{hash_of([FORMAT, signature, corpus.field, fraction])[:16]}.json"
    if (known := remembered(Scan, note)) is not None:
        return known
    scan = _scan(corpus, fraction, progress)
    check_unchanged(corpus, signature)
    with whole_file(note) as file:
        file.write(json.dumps(asdict(scan)).encode())
    return scan


def _scan(corpus: Corpus, fraction: float, progress: bool) -> Scan:
    digest, documents, characters, size, validation = hashlib.sha256(), 0, 0, 0, 0
    aside = False
    with progress_bar("reading", corpus.size, progress) as bar:
        for piece in corpus.pieces(bar.update):
            encoded = piece.text.encode()
            if piece.opens:
                documents += 1
                aside = is_validation(piece.text, fraction)
                digest.update(b"\xff")  # in no UTF-8, so documents cannot run together
            digest.update(encoded)
            characters += len(piece.text)
            size += len(encoded)
            validation += len(encoded) * aside
    if not documents:
        raise UserError(f"{corpus.name} is empty: put text there")
    return Scan(digest.hexdigest(), documents, characters, size, validation)


# --- fitting


def _remembered_fit(
    corpus: Corpus,
    signature: Signature,
    scan: Scan,
    name: str,
    vocab_size: int | None,
    cache: Path,
    progress: bool,
) -> Tokenizer:
    """The tokenizer called `name` for this text, from disk if it was fitted to the same before."""
    kept = cache / f"tokenizer-{hash_of([FORMAT, scan.digest, Tokenizer.named(name).name, vocab_size])[:16]}.json"
    with locked(kept):
        with suppress(UserError):
            return Tokenizer.load(kept)
        tokenizer = _fit(corpus, scan, name, vocab_size, progress)
        check_unchanged(corpus, signature)
        tokenizer.save(kept)
    return tokenizer


def _fit(corpus: Corpus, scan: Scan, name: str, vocab_size: int | None, progress: bool) -> Tokenizer:
    member = Tokenizer.named(name)
    limit = member.fit_limit

    def texts() -> Iterator[str]:
        with progress_bar(f"fitting {name}", corpus.size, progress) as bar:
            texts = (piece.text for piece in corpus.pieces(bar.update))
            yield from texts if limit is None else sample(texts, limit / scan.bytes)

    if limit and scan.bytes > limit and progress:
        print(
            f"fitting {name} to an even sample of {limit / 1e6:.0f} MB of the {scan.bytes / 1e6:.0f} MB",
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
    corpus: Corpus,
    signature: Signature,
    scan: Scan,
    tokenizer: Tokenizer,
    split: str,
    fraction: float,
    folder: Path,
    *,
    workers: int | None,
    progress: bool,
) -> None:
    """Fills `folder` with train.bin, validation.bin, tokenizer.json and meta.json."""
    tokenizer.save(folder / "tokenizer.json")
    pieces = corpus.pieces()
    if split == "documents":
        parts = by_document(pieces, fraction)
    else:
        parts = contiguous(pieces, int(scan.characters * (1 - fraction)))
    counts = _write(parts, tokenizer, folder, scan.bytes, workers, progress)
    check_unchanged(corpus, signature)
    assert sum(counts[split]["bytes"] for split in SPLITS) == scan.bytes, "the corpus is not what was scanned"
    meta = {"format": FORMAT, "dtype": dtype_of(tokenizer).name, "split": split, **counts}
    (folder / "meta.json").write_text(json.dumps(meta))


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
