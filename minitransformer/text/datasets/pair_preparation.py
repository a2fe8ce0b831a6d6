"""Tokenization of files of pairs: sources and targets, in a training and a validation split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from minitransformer.errors import UserError
from minitransformer.processes import processors
from minitransformer.settings import Chosen
from minitransformer.text.datasets.overlap import SharedDocuments
from minitransformer.text.datasets.pair_data import PreparedPairs, framed_but_last
from minitransformer.text.datasets.pipeline import SPLITS, Preparation
from minitransformer.text.pairs import Pair, PairCorpus
from minitransformer.text.threads import in_order, progress_bar
from minitransformer.text.token_files import Ragged, RaggedWriter, TokenPairs, Tokens
from minitransformer.text.tokenizers import Tokenizer

SIDES = ("source", "target")
POLICIES = ("skip", "cut")
# Pairs per task of a thread, enough for negligible overhead.
CHUNK = 1024


@dataclass(frozen=True)
class PairScan:
    """Statistics of a pair corpus, needed before encoding."""

    digest: str
    pairs: int
    bytes: tuple[int, int]
    """bytes of sources and of targets"""


class EncodedPair(NamedTuple):
    """A tokenized pair, and its hash in [0, 1), so that duplicates are in one split and order does not matter."""

    place: float
    sides: tuple[Tokens, Tokens]
    too_long: bool
    bytes: int
    row: int = 0
    """its number in the corpus"""


@dataclass
class PairPreparation(Preparation[PairCorpus, PairScan, PreparedPairs]):
    """Tokenize pairs into the sources and targets of two splits.

    One tokenizer is fitted to both sides of `corpus`, or with `separate` one to each; a given one is for both
    sides unless there is a `target_tokenizer`. Without a validation corpus, pairs are split by their hash, with
    at least one for validation. Each side, end token included, must fit into `context_length`; longer pairs are
    left out (`too_long` "skip") or truncated ("cut").
    """

    target_tokenizer: Tokenizer | None = None
    separate: bool = False
    too_long: str = "skip"

    scan_type: ClassVar[type[PairScan]] = PairScan
    key = ("pairs",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.too_long not in POLICIES:
            raise UserError(f"too_long is {self.too_long!r}: choose {' or '.join(map(repr, POLICIES))}")

    def scan_key(self, corpus: PairCorpus) -> list[Any]:
        return [corpus.fields, corpus.lowercase]

    def scan(self, corpus: PairCorpus, on_read: Callable[[int], object]) -> PairScan:
        digest, count, sizes = hashlib.sha256(), 0, [0, 0]
        for pair in corpus.pairs(on_read):
            count += 1
            for side, text in enumerate(pair):
                encoded = text.encode()
                digest.update(encoded + b"\xff")  # not in UTF-8, so it separates texts
                sizes[side] += len(encoded)
        return PairScan(digest.hexdigest(), count, (sizes[0], sizes[1]))

    def choose_tokenizers(self) -> tuple[Tokenizer, ...]:
        source, target = self.tokenizer, self.target_tokenizer
        if isinstance(source, Chosen):
            if target is None and self.separate:
                target = self._fitted(source, 1)
            source = self._fitted(source, 0) if target is not None else self._fitted(source, 0, 1)
        source = source.check_vocab_size(self.vocab_size)
        return (source,) if target is None or target is source else (source, target)

    def _fitted(self, chosen: Chosen[Tokenizer], *sides: int) -> Tokenizer:
        """The `chosen` tokenizer, fitted to the texts of `sides`."""

        def side_of(side: int) -> Iterator[str]:
            return (pair[side] for pair in self.corpus.pairs())

        # One side after the other: an even sample of alternating sides could miss one.
        scan = self.scans[0]
        size = sum(scan.bytes[side] for side in sides)
        return self.fitted(chosen, lambda: map(side_of, sides), size, [scan.digest], self.vocab_size, sides)

    @property
    def both(self) -> tuple[Tokenizer, Tokenizer]:
        """The tokenizers of sources and of targets, which may be the same."""
        return self.tokenizers[0], self.tokenizers[-1]

    def identity(self, division: str) -> list[Any]:
        corpus, *validation = (scan.digest for scan in self.scans)
        prints = [member.fingerprint for member in self.both]
        return [corpus, prints, validation or self.validation_fraction, self.context_length, self.too_long]

    def write(self, division: str, folder: Path) -> dict[str, Any]:
        counts, shared = dict.fromkeys(POLICIES, 0), SharedDocuments()
        with ExitStack() as stack:
            writers = {
                split: [
                    RaggedWriter(folder, f"{split}-{side}", tokenizer, stack)
                    for side, tokenizer in zip(SIDES, self.both, strict=True)
                ]
                for split in SPLITS
            }
            for split, pair in self.parts(counts):
                shared.add_digest(self.digest(pair), split == SPLITS[1])
                for writer, tokens in zip(writers[split], pair.sides, strict=True):
                    writer.add(tokens)
        counts["shared"] = shared.count()
        return {**counts, **{writer.name: writer.finish() for split in SPLITS for writer in writers[split]}}

    def digest(self, pair: EncodedPair) -> int:
        """64 bits that pairs have in common if their texts are the same."""
        return int(pair.place * 2**64)

    def parts(self, counts: dict[str, int]) -> Iterator[tuple[str, EncodedPair]]:
        """Each remaining pair with its split; `counts` is updated with those that are too long."""
        kept = [self._fitting(self._encoded(*each), counts) for each in zip(self.corpora, self.scans, strict=True)]
        if len(kept) == 1:
            yield from divided(kept[0], self.validation_fraction)
        else:
            yield from ((split, pair) for split, pairs in zip(SPLITS, kept, strict=True) for pair in pairs)

    def corpus_of(self, split: str) -> PairCorpus:
        """The corpus that a split is from."""
        return self.validation if split == SPLITS[1] and self.validation is not None else self.corpus

    def rows(self, split: str) -> list[int]:
        """The numbers of the rows of its corpus that a split has, in its order."""
        self.fit()
        place = 1 if self.corpus_of(split) is self.validation else 0
        kept = self._fitting(self._encoded(self.corpora[place], self.scans[place]), dict.fromkeys(POLICIES, 0))
        if self.validation is not None:
            return [pair.row for pair in kept]
        return [pair.row for each, pair in divided(kept, self.validation_fraction) if each == split]

    def _fitting(self, pairs: Iterable[EncodedPair], counts: dict[str, int]) -> Iterator[EncodedPair]:
        for pair in pairs:
            counts[self.too_long] += pair.too_long
            if self.too_long == "cut" or not pair.too_long:
                yield pair

    def _encoded(self, corpus: PairCorpus, scan: PairScan) -> Iterator[EncodedPair]:
        """Every pair in order, encoded in parallel threads."""
        pairs = corpus.pairs()
        chunks, count = iter(lambda: list(islice(pairs, CHUNK)), []), 0
        with progress_bar("encoding pairs", sum(scan.bytes), self.progress) as bar:
            for chunk in in_order(lambda chunk: list(map(self._encode, chunk)), chunks, self.workers or processors()):
                yield from (pair._replace(row=number) for number, pair in enumerate(chunk, start=count))
                count += len(chunk)
                bar.update(sum(pair.bytes for pair in chunk))

    def _encode(self, pair: Pair) -> EncodedPair:
        """Both sides as ids, truncated to the context with `too_long` "cut"."""
        sides = [member.encode_array(text) for member, text in zip(self.both, pair, strict=True)]
        rooms = [self.context_length - member.pair_framing.length for member in self.both]
        too_long = any(len(side) > room for side, room in zip(sides, rooms, strict=True))
        if self.too_long == "cut":
            sides = [side[:room] for side, room in zip(sides, rooms, strict=True)]
        source, target = (framed_but_last(side, member) for side, member in zip(sides, self.both, strict=True))
        return EncodedPair(place_of(pair), (source, target), too_long, sum(len(text.encode()) for text in pair))

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any], tokenizers: Sequence[Tokenizer]) -> PreparedPairs:
        def pairs_of(split: str) -> TokenPairs:
            sides = zip((f"{split}-{side}" for side in SIDES), (tokenizers[0], tokenizers[-1]), strict=True)
            return TokenPairs(*(Ragged.load(folder, name, meta[name], tokenizer) for name, tokenizer in sides))

        train, validation = map(pairs_of, SPLITS)
        skipped, cut = (int(meta[policy]) for policy in POLICIES)
        shared = int(meta.get("shared", 0))  # older folders do not say
        return PreparedPairs(folder, tokenizers[0], tokenizers[-1], validation, train, skipped, cut, shared)

    def fault(self, prepared: PreparedPairs) -> UserError | None:
        for split in SPLITS if self.validation is not None or self.validation_fraction else SPLITS[:1]:
            if not len(getattr(prepared, split)):
                pairs = f"{self.scans[0].pairs} pairs, {prepared.skipped} of them too long"
                return UserError(
                    f"{self.corpus.name} leaves no pairs for {split} ({pairs} for {self.context_length} tokens): "
                    "give more pairs, or choose a greater --context-length"
                )
        return None


def place_of(texts: Sequence[str]) -> float:
    """The hash of `texts`, in [0, 1)."""
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def divided(pairs: Iterable[EncodedPair], fraction: float) -> Iterator[tuple[str, EncodedPair]]:
    """Each pair with its split: validation has the hashes below `fraction`, or else the lowest one.

    With a fraction of 0, all are for training.
    """
    if not fraction:
        yield from (("train", pair) for pair in pairs)
        return
    lowest: list[EncodedPair] = []
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
