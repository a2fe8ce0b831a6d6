"""The order of a mixture: which shard each row of training takes, and in which order those of a shard come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

MOST_WEIGHT = 1 << 31
"""sum of whole weights: products of two such numbers fit into 64 bits"""
Numbers = npt.NDArray[np.int64]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights`: exactly if their sum stays below 2³¹, or else to nine digits."""
    ratios = [Fraction(repr(weight)) for weight in weights]
    scale = Fraction(lcm(*(ratio.denominator for ratio in ratios)))
    scale /= gcd(*(int(ratio * scale) for ratio in ratios))
    if sum(ratios) * scale >= MOST_WEIGHT:
        scale = Fraction(MOST_WEIGHT >> 1) / sum(ratios)
    return [max(1, round(ratio * scale)) for ratio in ratios]


@dataclass(frozen=True)
class Mixture:
    """An endless sequence of shards, of which each has its share by weight in every beginning.

    The shards are halved again and again. Where a half has the share p of the weight, the first n rows have
    ⌊n p + ½⌋ rows of it: that never falls as n grows, so it says of each row by itself which half it belongs to, and
    how many rows of that half come before. Each halving is off by half a row at most, so of n rows a shard has n times
    its share up to ⌈log₂ shards⌉ / 2 rows.
    """

    weights: tuple[int, ...]

    @cached_property
    def _below(self) -> Numbers:
        """[shards + 1] the weight of all shards before each."""
        return np.cumsum([0, *self.weights], dtype=np.int64)

    def places(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """The shard of each of `rows`, and how many rows of that shard come before it."""
        before = np.asarray(rows, np.int64)
        low, high = np.zeros_like(before), np.full_like(before, len(self.weights))
        for _ in range((len(self.weights) - 1).bit_length()):
            middle = (low + high) // 2
            part, whole = self._below[middle] - self._below[low], self._below[high] - self._below[low]
            left = _shared(before, part, whole)
            is_left = _shared(before + 1, part, whole) > left
            before = np.where(is_left, left, before - left)
            low, high = np.where(is_left, low, middle), np.where(is_left, middle, high)
        return low, before


def _shared(rows: Numbers, part: Numbers, whole: Numbers) -> Numbers:
    """⌊rows · part / whole + ½⌋, without overflow."""
    times, rest = np.divmod(rows, whole)
    shared: Numbers = times * part + (rest * part + whole // 2) // whole
    return shared


def permuted(places: Numbers, counts: Numbers, keys: npt.NDArray[np.uint64]) -> Numbers:
    """A pseudo-random permutation of the numbers below each of `counts`, at `places` [places], without a table.

    A Feistel network with the `keys` [places, rounds], on as many bits as a count needs, repeated until the result is
    below the count. Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, section 3 (cycle walking).
    """
    halves = np.array([max(1, ((count - 1).bit_length() + 1) // 2) for count in counts.tolist()], np.uint64)
    found, walking = places.astype(np.uint64), np.arange(len(places))
    while len(walking):
        half, rounds = halves[walking], keys[walking].T
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = found[walking] >> half, found[walking] & mask
        for key in rounds:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[walking] = left << half | right
        walking = walking[found[walking] >= counts[walking].astype(np.uint64)]
    return found.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits: the output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
