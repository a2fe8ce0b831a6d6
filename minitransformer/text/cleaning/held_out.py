"""The n-grams of held-out texts, and which of them stand in training documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.text.cleaning.formats import DocumentFile
from minitransformer.text.cleaning.ngrams import HashedTexts, hash_ngrams, hash_words

NGRAMS = "held-out.npy"
MOST_NGRAMS = 20_000_000
SAMPLE = 32
"""n-grams of a document that are noted, those with the smallest hashes, so that documents note the same ones"""
COMMON = 10
"""n-grams in more documents than this are phrases in common use. Brown et al. 2020 (arXiv 2005.14165), appendix C"""


@dataclass(frozen=True)
class HeldOut:
    """The distinct n-grams of held-out texts, as sorted hashes."""

    ngrams: npt.NDArray[np.uint64]

    @classmethod
    def open(cls, folder: Path) -> HeldOut:
        """The n-grams that `write` left in `folder`; they stay on disk until they are used."""
        return cls(np.load(folder / NGRAMS, mmap_mode="r"))

    @classmethod
    def write(cls, folder: Path, files: tuple[DocumentFile, ...], n: int) -> None:
        """Write the n-grams of all documents of `files`; raises `UserError` for too many."""
        ngrams = np.empty(0, np.uint64)
        for texts in _ngrams_of(files, n):
            ngrams = np.union1d(ngrams, texts.hashes)
            if len(ngrams) > MOST_NGRAMS:
                raise UserError(
                    f"--against names more than {MOST_NGRAMS:,} {n}-grams, and all of them are held in memory: name a "
                    "smaller held-out file"
                )
        np.save(folder / NGRAMS, ngrams)

    def _places(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Where each of `hashes` would stand among the n-grams, and whether it does."""
        if not len(self.ngrams):
            return np.zeros(len(hashes), np.int64), np.zeros(len(hashes), bool)
        places = np.searchsorted(self.ngrams, hashes)
        return places, self.ngrams[np.minimum(places, len(self.ngrams) - 1)] == hashes

    def found(self, texts: HashedTexts) -> dict[str, npt.NDArray[Any]]:
        """Streams of a journal: the n-grams that stand in any text, and a sample of those of each text."""
        places, found = self._places(texts.hashes)
        owners = np.repeat(np.arange(len(texts.offsets) - 1), np.diff(texts.offsets))[found]
        pairs = np.unique(np.stack([owners, places[found]], axis=1), axis=0)
        first = np.searchsorted(pairs[:, 0], pairs[:, 0])
        sample = pairs[np.arange(len(pairs)) - first < SAMPLE]
        overlaps = np.zeros(len(sample), [("document", "<u8"), ("ngram", "<u4")])
        overlaps["document"], overlaps["ngram"] = sample.T
        return {"overlaps": overlaps, "hits": np.unique(pairs[:, 1]).astype("<u4")}

    def shares(
        self, files: tuple[DocumentFile, ...], n: int, hit: npt.NDArray[np.bool_]
    ) -> Iterator[npt.NDArray[np.float64]]:
        """Of each held-out document with words, the share of its n-grams that are `hit`, some documents at a time."""
        for texts in _ngrams_of(files, n):
            counts = np.diff(texts.offsets)
            found = np.concatenate([np.zeros(1), np.cumsum(hit[self._places(texts.hashes)[0]])])
            hits = found[texts.offsets[1:]] - found[texts.offsets[:-1]]
            yield hits[counts > 0] / counts[counts > 0]


def _ngrams_of(files: tuple[DocumentFile, ...], n: int) -> Iterator[HashedTexts]:
    for file in files:
        for block in file.blocks(lambda count: None, whole=False):
            yield hash_ngrams(hash_words([unit.text for unit in file.parse(block)]), n)


def leaked(overlaps: npt.NDArray[Any], is_kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The documents, of those that `is_kept`, with an n-gram of `overlaps` that is not in common use."""
    mine = overlaps[is_kept[overlaps["document"]]]
    counts = np.bincount(mine["ngram"])
    return np.unique(mine["document"][counts[mine["ngram"]] <= COMMON]).astype(np.int64)
