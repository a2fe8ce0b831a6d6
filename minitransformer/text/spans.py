"""Where runs of tokens stand in token files of any size, in memory that grows with the questions alone.

Runs are compared by hashes of 64 bits. The hash of tokens i to i + n is (P(i + n) − P(i)) · r⁻ⁱ modulo 2⁶⁴, with
P(i) = Σₖ mixed(tokenₖ) · rᵏ over k < i: Karp and Rabin 1987, "Efficient randomized pattern-matching algorithms".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.text.cleaning.ngrams import ODD, Hashes, mixed
from minitransformer.text.threads import progress_bar
from minitransformer.text.token_files import TokenSource

HASHED_AT_ONCE = 1 << 16
"""tokens that are hashed at a time: few enough for a processor's cache"""
TABLE_BITS = 20
INVERSE = np.uint64(pow(int(ODD), -1, 1 << 64))
RunCounts = npt.NDArray[np.int64]
TokenRows = npt.NDArray[Any]


def count_spans(spans: Sequence[Sequence[int]], tokens: TokenSource) -> RunCounts:
    """[spans] how often each of `spans`, of one token or more, stands in `tokens`."""
    lengths = np.array([len(span) for span in spans], np.int64)
    counts = np.zeros(len(spans), np.int64)
    hashes = np.array([_hashes(np.array([span]), len(span))[0, 0] for span in spans], np.uint64)
    wanted = {int(length): np.unique(hashes[lengths == length]) for length in np.unique(lengths)}
    for length, found in _count(wanted, tokens).items():
        of_length = lengths == length
        counts[of_length] = found[np.searchsorted(wanted[length], hashes[of_length])]
    return counts


def longest_runs(rows: TokenRows, tokens: TokenSource, shortest: int) -> RunCounts:
    """[rows, length] tokens of the longest run that begins at each place of `rows` and stands in `tokens`.

    A run ends with its row; those of fewer than `shortest` tokens count as 0. `tokens` are read twice.
    """
    length = rows.shape[1]
    found = np.zeros(rows.shape, np.int64)
    doubled = [shortest << k for k in range(length.bit_length()) if shortest << k <= length]
    _lengthen(found, rows, tokens, {n: np.ones(rows.shape, bool) for n in doubled})
    # A run of n tokens stands where one of n + 1 does, so that the lengths between two doubled ones are left.
    bounds = [n for n in doubled if (found == n).any()]
    between = {n: found == bound for bound in bounds for n in range(bound + 1, min(2 * bound, length + 1))}
    _lengthen(found, rows, tokens, between)
    return found


def _lengthen(
    found: RunCounts, rows: TokenRows, tokens: TokenSource, asked: Mapping[int, npt.NDArray[np.bool_]]
) -> None:
    """Set `found` to the largest length of `asked` at which a run stands in `tokens`, at the places asked about."""
    places = {n: np.nonzero(where[:, : rows.shape[1] - n + 1]) for n, where in asked.items()}
    hashes = {n: _hashes(rows, n)[at] for n, at in places.items()}
    wanted = {n: np.unique(of_length) for n, of_length in hashes.items() if len(of_length)}
    for n, counts in sorted(_count(wanted, tokens).items()):
        stands = counts[np.searchsorted(wanted[n], hashes[n])] > 0
        row, place = places[n]
        found[row[stands], place[stands]] = n


def covered_share(runs: RunCounts, least: int) -> npt.NDArray[np.float64]:
    """[rows] the share of tokens within one of the `runs` [rows, length] of at least `least` tokens."""
    places = np.arange(runs.shape[1])
    ends = np.maximum.accumulate(np.where(runs >= least, places + runs, 0), axis=1)
    return (ends > places).mean(1)


def _count(wanted: Mapping[int, Hashes], tokens: TokenSource) -> dict[int, RunCounts]:
    """How often each of the sorted hashes of runs of each length stands in `tokens`, of which a block is in memory."""
    counts = {n: np.zeros(len(hashes), np.int64) for n, hashes in wanted.items()}
    tables = {n: _table(hashes) for n, hashes in wanted.items()}
    overlap = max(wanted, default=1) - 1
    with progress_bar("searching", len(tokens), progress=True) as bar:
        for start in range(0, len(tokens) if wanted else 0, HASHED_AT_ONCE):
            sums = _prefix_sums(tokens[start : start + HASHED_AT_ONCE + overlap])
            for n, hashes in wanted.items():
                here = _runs(sums, n)[:HASHED_AT_ONCE]
                here = here[tables[n][here >> np.uint64(64 - TABLE_BITS)]]
                places = np.minimum(np.searchsorted(hashes, here), len(hashes) - 1)
                counts[n] += np.bincount(places[hashes[places] == here], minlength=len(hashes))
            bar.update(min(HASHED_AT_ONCE, len(tokens) - start))
    return counts


def _table(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Whether there is a hash with these first bits, which most others are told from by one look."""
    table = np.zeros(1 << TABLE_BITS, bool)
    table[hashes >> np.uint64(64 - TABLE_BITS)] = True
    return table


def _hashes(rows: TokenRows, n: int) -> Hashes:
    """[rows, length − n + 1] of the runs of `n` tokens from each place of `rows`."""
    return _runs(_prefix_sums(rows), n)


def _prefix_sums(tokens: TokenRows) -> Hashes:
    """P of the places 0 to length of `tokens` [..., length]."""
    length = tokens.shape[-1]
    weighted = mixed(np.asarray(tokens).astype(np.uint64) + ODD) * _powers(int(ODD), length)
    start = np.zeros((*tokens.shape[:-1], 1), np.uint64)
    return np.concatenate([start, np.cumsum(weighted, -1, dtype=np.uint64)], -1)


def _runs(sums: Hashes, n: int) -> Hashes:
    count = max(0, sums.shape[-1] - n)
    return mixed((sums[..., n:] - sums[..., :count]) * _powers(int(INVERSE), count))


@cache
def _powers(base: int, count: int) -> Hashes:
    """base to the powers 0 to count − 1, modulo 2⁶⁴."""
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(max(0, count - 1), base, np.uint64)]))[:count]
