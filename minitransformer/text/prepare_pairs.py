"""Pairs of texts become memory-mapped files of token ids, once."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import sweep, writing
from minitransformer.records import read_json
from minitransformer.text.corpora import Corpus
from minitransformer.text.folders import REMEDY, work_folder
from minitransformer.text.pair_batches import SequentialPairs, ShuffledPairs
from minitransformer.text.pairs import Pair, PairCorpus
from minitransformer.text.preparing import (
    SPLITS,
    Tokens,
    check_unchanged,
    cores,
    dtype_of,
    hash_of,
    in_order,
    kept_tokenizer,
    made,
    mapped,
    noted,
    progress_bar,
    sample,
    stored_dtype,
)
from minitransformer.text.token_pairs import Ragged, TokenPairs
from minitransformer.text.tokenizers import Tokenizer

FORMAT = 1
SIDES = ("source", "target")
POLICIES = ("skip", "cut")
# What a thread encodes at once: enough that the price of a task vanishes.
CHUNK = 1024
OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class PairData:
    """Pairs to learn from, whether they lie in a folder or are made up: what training and validation ask of both.

    `target_tokenizer` is the same object as `tokenizer` where the sides share one. The folder's name changes with
    whatever changes the pairs.
    """

    folder: Path
    tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    validation: TokenPairs

    @cached_property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the targets, so that bits per byte = nats summed over them / ln 2 / these."""
        return count_bytes(self.target_tokenizer, self.validation.targets.tokens)

    @property
    def ends(self) -> tuple[int, int]:
        """The last tokens of sources and of targets."""
        return self.tokenizer.pair_framing.after[-1], self.target_tokenizer.pair_framing.after[-1]

    def validation_batches(self, batch_tokens: int) -> SequentialPairs:
        """Every pair of the validation split once."""
        return SequentialPairs(self.validation, batch_tokens, *self.ends, start=self.target_tokenizer.target_start)


@dataclass(frozen=True)
class PreparedPairs(PairData):
    """The token ids of both splits, mapped from disk.

    Of the pairs with a side that is too long for the context, `skipped` are in no split, and `cut` are, shortened.
    """

    train: TokenPairs
    skipped: int
    cut: int

    def training_batches(self, batch_tokens: int, seed: int) -> ShuffledPairs:
        """Batches of at most `batch_tokens` tokens a side, without end."""
        return ShuffledPairs(self.train, batch_tokens, *self.ends, seed, self.target_tokenizer.target_start)

    def summary(self) -> str:
        """Three or four lines to print, of less than 80 columns."""
        lines = [vocabularies(self.tokenizer, self.target_tokenizer)]
        lines += [described(split, getattr(self, split)) for split in SPLITS]
        if self.skipped or self.cut:
            lines.append(f"too long   {self.skipped:,} pairs skipped, {self.cut:,} cut")
        return "\n".join(lines)


def vocabularies(tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> str:
    """The line of a summary that names the tokenizers."""
    line = f"tokens     {tokenizer.name} tokenizer, {tokenizer.vocab_size:,} tokens"
    if target_tokenizer is tokenizer:
        return f"{line} for both sides"
    return f"{line}; targets: {target_tokenizer.name}, {target_tokenizer.vocab_size:,}"


def described(split: str, pairs: TokenPairs) -> str:
    """The line of a summary that says how much a split holds."""
    if not len(pairs):
        return f"{split:10} none: nothing tells when training goes too far"
    source, target = len(pairs.sources.tokens), len(pairs.targets.tokens)
    return f"{split:10} {len(pairs):,} pairs of {source:,} and {target:,} tokens"


def count_bytes(tokenizer: Tokenizer, tokens: Tokens) -> int:
    """The bytes of text that `tokens` [tokens] stand for."""
    sizes = np.array([len(piece) for piece in tokenizer.pieces])
    return int(sizes @ np.bincount(tokens, minlength=len(sizes)))


@dataclass(frozen=True)
class Scan:
    """What must be known of pairs before they are encoded."""

    digest: str
    pairs: int
    bytes: tuple[int, int]
    """of sources and of targets"""


class Encoded(NamedTuple):
    """A pair as token ids, and its place in [0, 1): a hash, so duplicates stay together and order does not matter."""

    place: float
    sides: tuple[Tokens, Tokens]
    too_long: bool
    bytes: int


def prepare_pairs(
    corpus: PairCorpus,
    tokenizer: str | Tokenizer,
    *,
    target_tokenizer: Tokenizer | None = None,
    separate: bool = False,
    vocab_size: int | None = None,
    validation: PairCorpus | None = None,
    validation_fraction: float = 0.1,
    context_length: int,
    too_long: str = "skip",
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> PreparedPairs:
    """The pairs as token ids, from `cache` (default: the work folder's `prepared/`) if they were prepared before.

    `tokenizer` is a registered name, fitted to both sides of `corpus` together, or with `separate` one to each; or a
    ready one, for both sides unless there is a `target_tokenizer`. `vocab_size` is what a fitted one has, and what a
    ready `tokenizer` must fit into. Without a corpus for `validation`, those pairs go there whose hash says so, and at
    least one; none if `validation_fraction` is 0. Each side must leave room for its end token in `context_length`;
    pairs with a longer one are left out (`too_long` "skip"), or lose what is too much ("cut").
    Raises `UserError` for too few pairs, text that cannot be read or encoded, and when the disk is full.
    """
    if too_long not in POLICIES:
        raise UserError(f"too_long is {too_long!r}: choose {' or '.join(map(repr, POLICIES))}")
    if validation is None and not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: choose one from 0 to below 1, such as 0.1")
    cache = work_folder() / "prepared" if cache is None else cache
    with writing(cache, REMEDY):
        cache.mkdir(parents=True, exist_ok=True)
        sweep(cache)
        corpora = [corpus] if validation is None else [corpus, validation]
        signatures = [each.signature() for each in corpora]
        scans = [_remembered_scan(each, cache) for each in corpora]
        tokenizers = _tokenizers(corpus, scans[0], tokenizer, target_tokenizer, separate, vocab_size, cache)
        prints = [member.fingerprint for member in tokenizers]
        division = [scan.digest for scan in scans[1:]] or validation_fraction
        key = hash_of(["pairs", FORMAT, scans[0].digest, prints, division, context_length, too_long])[:16]
        encode = partial(_encode, tokenizers=tokenizers, room=context_length - 1, cut=too_long == "cut")

        def build(folder: Path) -> None:
            streams = [
                _encoded(each, scan, encode, workers, progress) for each, scan in zip(corpora, scans, strict=True)
            ]
            _build(streams, tokenizers, validation_fraction, too_long, folder)
            for each, signature in zip(corpora, signatures, strict=True):
                check_unchanged(Corpus(each.name, each.files), signature)

        prepared = made(cache / key, build, opened)
    for split in SPLITS if validation is not None or validation_fraction else SPLITS[:1]:
        if not len(getattr(prepared, split)):
            raise UserError(
                f"{corpus.name} leaves no pairs for {split} ({scans[0].pairs} pairs, {prepared.skipped} of them too "
                f"long for {context_length} tokens): give more pairs, or choose a greater --context-length"
            )
    return prepared


# --- scanning and fitting


def _remembered_scan(corpus: PairCorpus, cache: Path) -> Scan:
    """The scan of these files in this state, from disk if they were scanned before."""
    signature = corpus.signature()
    key = hash_of(["pairs", FORMAT, signature, corpus.fields, corpus.lowercase])[:16]
    note = cache / f"scan-{key}.json"

    def find() -> Scan:
        scan = _scan(corpus)
        check_unchanged(Corpus(corpus.name, corpus.files), signature)
        return scan

    return noted(note, Scan, find)


def _scan(corpus: PairCorpus) -> Scan:
    digest, count, sizes = hashlib.sha256(), 0, [0, 0]
    for pair in corpus.pairs():
        count += 1
        for side, text in enumerate(pair):
            encoded = text.encode()
            digest.update(encoded + b"\xff")  # in no UTF-8, so texts cannot run together
            sizes[side] += len(encoded)
    return Scan(digest.hexdigest(), count, (sizes[0], sizes[1]))


def _tokenizers(
    corpus: PairCorpus,
    scan: Scan,
    tokenizer: str | Tokenizer,
    target_tokenizer: Tokenizer | None,
    separate: bool,
    vocab_size: int | None,
    cache: Path,
) -> tuple[Tokenizer, Tokenizer]:
    """Those of sources and targets, one and the same where they share it."""
    if isinstance(tokenizer, str):
        fit = partial(_remembered_fit, corpus, scan, tokenizer, vocab_size, cache)
        if target_tokenizer is None and separate:
            target_tokenizer = fit((1,))
        tokenizer = fit((0, 1) if target_tokenizer is None else (0,))
    return tokenizer.check_vocab_size(vocab_size), tokenizer if target_tokenizer is None else target_tokenizer


def _remembered_fit(
    corpus: PairCorpus, scan: Scan, name: str, vocab_size: int | None, cache: Path, sides: tuple[int, ...]
) -> Tokenizer:
    """The tokenizer called `name` for the texts of `sides`, from disk if it was fitted to the same before."""
    member = Tokenizer.named(name)
    size = sum(scan.bytes[side] for side in sides)
    share = 1.0 if member.fit_limit is None else min(1.0, member.fit_limit / size)

    def texts() -> Iterator[str]:
        # One side after the other: a sample of both in turn could have one side only.
        for side in sides:
            yield from sample((pair[side] for pair in corpus.pairs()), share)

    kept = cache / f"tokenizer-{hash_of(['pairs', FORMAT, scan.digest, member.name, vocab_size, sides])[:16]}.json"
    return kept_tokenizer(kept, lambda: member.fit(texts, vocab_size))


# --- encoding and splitting


def _place(pair: Pair) -> float:
    digest = hashlib.blake2b("\0".join(pair).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _encode(pair: Pair, *, tokenizers: tuple[Tokenizer, Tokenizer], room: int, cut: bool) -> Encoded:
    """Both sides as ids, [at most room] each if `cut`."""
    sides = [member.encode_array(text) for member, text in zip(tokenizers, pair, strict=True)]
    rooms = [room + 1 - member.pair_framing.length for member in tokenizers]
    too_long = any(len(side) > limit for side, limit in zip(sides, rooms, strict=True))
    if cut:
        sides = [side[:limit] for side, limit in zip(sides, rooms, strict=True)]
    source, target = (framed_but_last(side, member) for side, member in zip(sides, tokenizers, strict=True))
    return Encoded(_place(pair), (source, target), too_long, sum(len(text.encode()) for text in pair))


def framed_but_last(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    """`tokens` [tokens] with all that stands around them but the last token, which batches add."""
    framing = tokenizer.pair_framing
    return tokens if framing.length == 1 else np.array(framing.around(tokens.tolist())[:-1], tokens.dtype)


def _encoded(
    corpus: PairCorpus, scan: Scan, encode: Callable[[Pair], Encoded], workers: int | None, progress: bool
) -> Iterator[Encoded]:
    """Every pair in order, encoded on threads."""
    pairs = corpus.pairs()
    chunks = iter(lambda: list(islice(pairs, CHUNK)), [])
    with progress_bar("encoding pairs", sum(scan.bytes), progress) as bar:
        for chunk in in_order(lambda chunk: [encode(pair) for pair in chunk], chunks, workers or cores()):
            yield from chunk
            bar.update(sum(pair.bytes for pair in chunk))


def divided(pairs: Iterable[Encoded], fraction: float) -> Iterator[tuple[str, Encoded]]:
    """Each pair with its split: validation has the places below `fraction`, or the lowest one if there are none.

    Of a fraction of 0 there are none, and all are for training.
    """
    if not fraction:
        yield from (("train", pair) for pair in pairs)
        return
    lowest: list[Encoded] = []
    found = False
    for pair in pairs:
        if pair.place < fraction:
            found = True
            yield "validation", pair
        elif lowest and pair.place > lowest[0].place:
            yield "train", pair
        else:
            if lowest and pair.place < lowest[0].place:
                yield from (("train", other) for other in lowest)
                lowest = []
            lowest.append(pair)
    yield from (("train" if found else "validation", pair) for pair in lowest)


# --- building


class _Writer:
    """Writes the texts of one side of one split, and at the end where each begins."""

    def __init__(self, folder: Path, split: str, side: str, tokenizer: Tokenizer, stack: ExitStack) -> None:
        self.name = f"{split}-{side}"
        self.tokens = stack.enter_context((folder / f"{self.name}.bin").open("wb"))
        self.offsets = folder / f"{self.name}-offsets.bin"
        self.dtype, self.ends = dtype_of(tokenizer), array("q", [0])

    def add(self, tokens: Tokens) -> None:
        self.tokens.write(tokens.astype(self.dtype).data)
        self.ends.append(self.ends[-1] + len(tokens))

    def finish(self) -> dict[str, Any]:
        self.offsets.write_bytes(np.array(self.ends, OFFSET).tobytes())
        return {"dtype": self.dtype.name, "texts": len(self.ends) - 1, "tokens": self.ends[-1]}


def _build(
    streams: list[Iterator[Encoded]],
    tokenizers: tuple[Tokenizer, Tokenizer],
    fraction: float,
    too_long: str,
    folder: Path,
) -> None:
    """Fills `folder` with the tokens and the offsets of each side of each split, the tokenizers, and meta.json.

    `streams` are the pairs of train and of validation, or of both, to be divided.
    """
    tokenizers[0].save(folder / "tokenizer.json")
    if tokenizers[1] is not tokenizers[0]:
        tokenizers[1].save(folder / "target_tokenizer.json")
    counts = dict.fromkeys(POLICIES, 0)

    def fitting(pairs: Iterator[Encoded]) -> Iterator[Encoded]:
        for pair in pairs:
            counts[too_long] += pair.too_long
            if too_long == "cut" or not pair.too_long:
                yield pair

    kept = [fitting(stream) for stream in streams]
    if len(kept) == 1:
        parts = divided(kept[0], fraction)
    else:
        parts = ((split, pair) for split, pairs in zip(SPLITS, kept, strict=True) for pair in pairs)
    with ExitStack() as stack:
        writers = {
            split: [_Writer(folder, split, *side, stack) for side in zip(SIDES, tokenizers, strict=True)]
            for split in SPLITS
        }
        for split, pair in parts:
            for writer, tokens in zip(writers[split], pair.sides, strict=True):
                writer.add(tokens)
    meta = {writer.name: writer.finish() for split in SPLITS for writer in writers[split]}
    (folder / "meta.json").write_text(json.dumps({"format": FORMAT, **counts, **meta}))


# --- opening


def opened(folder: Path) -> PreparedPairs | None:
    """What `prepare_pairs` made in `folder`; None if there is nothing, or something that is not whole."""
    try:
        meta = read_json(folder / "meta.json", REMEDY)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        other = folder / "target_tokenizer.json"
        target_tokenizer = Tokenizer.load(other) if other.exists() else tokenizer
        sides = dict(zip(SIDES, (tokenizer, target_tokenizer), strict=True))
        train, validation = (
            TokenPairs(*(_ragged(folder, f"{split}-{side}", meta, sides[side]) for side in SIDES)) for split in SPLITS
        )
        skipped, cut = (int(meta[policy]) for policy in POLICIES)
        return PreparedPairs(folder, tokenizer, target_tokenizer, validation, train, skipped, cut)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _ragged(folder: Path, name: str, meta: dict[str, Any], tokenizer: Tokenizer) -> Ragged:
    content = meta[name]
    tokens = mapped(folder / f"{name}.bin", stored_dtype(content["dtype"], tokenizer), content["tokens"])
    offsets: npt.NDArray[Any] = mapped(folder / f"{name}-offsets.bin", OFFSET, content["texts"] + 1)
    return Ragged(tokens, offsets)
