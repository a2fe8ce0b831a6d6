"""Which documents repeat earlier ones, exactly or nearly: found on disk, in little memory for each document."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from minitransformer.text.cleaning.examination import SHINGLE
from minitransformer.text.cleaning.journal import SIGNATURE, Journal
from minitransformer.text.cleaning.ngrams import ODD, mixed

Indices = npt.NDArray[np.int64]
PARTITION = 1 << 22
"""documents, about, whose fingerprints are compared at a time"""
ROWS = 3
BANDS = SIGNATURE // ROWS
"""of a signature: documents with the Jaccard index J share one of 42 bands of 3 numbers with probability 1-(1-J³)⁴²"""
KEYS = 1 << 23
"""keys of bands in memory at a time"""
PAIRS = 1 << 14
"""pairs of signatures that are compared at a time"""


def exact_duplicates(journal: Journal, is_kept: npt.NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """The documents, of those that `is_kept`, with the fingerprint of an earlier one, and the first of these."""
    bits = max(0, (journal.counts["documents"] // PARTITION)).bit_length()
    later, first = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for partition in range(1 << bits):
        places, prints = _partition(journal, is_kept, bits, partition)
        order = np.lexsort((prints[:, 1], prints[:, 0]))  # stable: equal fingerprints stay in the order of documents
        places, prints = places[order], prints[order]
        begins = np.ones(len(places), bool)
        begins[1:] = (prints[1:] != prints[:-1]).any(1)
        firsts = places[begins][np.cumsum(begins) - 1]
        later.append(places[~begins])
        first.append(firsts[~begins])
    return np.concatenate(later), np.concatenate(first)


def _partition(
    journal: Journal, is_kept: npt.NDArray[np.bool_], bits: int, partition: int
) -> tuple[Indices, npt.NDArray[np.uint64]]:
    """The kept documents whose fingerprints begin with the `bits` of `partition`, and these fingerprints."""
    places, prints, start = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)], 0
    for records in journal.read("documents"):
        found = records["fingerprint"]
        mine = is_kept[start : start + len(records)].copy()
        if bits:
            mine &= found[:, 0] >> np.uint64(64 - bits) == partition
        places.append(np.flatnonzero(mine) + start)
        prints.append(found[mine])
        start += len(records)
    return np.concatenate(places), np.concatenate(prints)


def least_jaccard(alike: float) -> float:
    """The Jaccard index of the shingles of two texts of which a share `alike` of the words is the same, scattered."""
    same = alike**SHINGLE
    return same / (2 - same)


def near_duplicates(journal: Journal, is_kept: npt.NDArray[np.bool_], alike: float) -> tuple[Indices, Indices]:
    """The documents, of those that `is_kept`, that resemble an earlier one, perhaps by way of others, and the first.

    Candidates share a band of their signatures (locality-sensitive hashing, Indyk & Motwani 1998), and are compared by
    their whole signatures.
    """
    leader: dict[int, int] = {}

    def lead(document: int) -> int:
        while (above := leader.get(document, document)) != document:
            leader[document] = leader.get(above, above)
            document = above
        return document

    for earlier, later in _similar_pairs(journal, _candidates(journal, is_kept), least_jaccard(alike)):
        first, second = sorted((lead(earlier), lead(later)))
        if first != second:
            leader[second] = first
    later_ones = np.array(sorted(leader), np.int64)
    return later_ones, np.array([lead(int(document)) for document in later_ones], np.int64)


def _candidates(journal: Journal, is_kept: npt.NDArray[np.bool_]) -> Indices:
    """[pairs, 2] distinct pairs of kept documents, the earlier one first, of which one follows the other in a band.

    Of the documents that share a band, each is paired with the first and with the one before it.
    """
    places = np.flatnonzero(is_kept)
    pairs = np.empty(0, np.int64)
    at_once = max(1, min(BANDS, KEYS // max(1, len(places))))
    for band in range(0, BANDS, at_once):
        keys, blank = _band_keys(journal, is_kept, range(band, min(band + at_once, BANDS)))
        for column in keys.T:
            order = np.argsort(column, kind="stable")
            order = order[~blank[order]]
            same = np.concatenate([np.zeros(1, bool), column[order][1:] == column[order][:-1]])[: len(order)]
            before = np.flatnonzero(same) - 1
            first = np.flatnonzero(~same)[np.cumsum(~same) - 1][same]
            new = [order[place] * len(places) + order[same] for place in (before, first)]
            pairs = np.unique(np.concatenate([pairs, *new]))
    return np.stack([places[pairs // max(1, len(places))], places[pairs % max(1, len(places))]], axis=1)


def _band_keys(
    journal: Journal, is_kept: npt.NDArray[np.bool_], bands: range
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """[kept documents, bands] the hash of each band of the signatures, and whether a signature is that of no words."""
    keys, blank, start = [np.empty((0, len(bands)), np.uint64)], [np.empty(0, bool)], 0
    for part in journal.read("signatures", 1 << 14):
        mine = part[is_kept[start : start + len(part)]].astype(np.uint64)
        start += len(part)
        key = np.zeros((len(mine), len(bands)), np.uint64)
        for row in range(ROWS):
            key = key * ODD + mine[:, [band * ROWS + row for band in bands]]
        keys.append(mixed(key))
        blank.append((mine == 2**32 - 1).all(1))
    return np.concatenate(keys), np.concatenate(blank)


def _similar_pairs(journal: Journal, pairs: Indices, least: float) -> Iterator[tuple[int, int]]:
    """Those of the `pairs` whose signatures agree in at least a share `least` of their numbers."""
    for start in range(0, len(pairs), PAIRS):
        some = pairs[start : start + PAIRS]
        agree = journal.signatures_of(some[:, 0]) == journal.signatures_of(some[:, 1])
        yield from some[agree.mean(1) >= least].tolist()
