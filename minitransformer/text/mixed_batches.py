"""Windows of several shards, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from minitransformer.text.batches import RandomWindows, windows_in
from minitransformer.text.mixture import Mixture, Numbers, permuted
from minitransformer.text.token_files import TokenSource

ROUNDS = 6
"""of the Feistel network: 4 are enough for many bits, and small domains need more"""


@lru_cache(maxsize=1 << 14)
def _epoch_keys(seed: int, shard: int, epoch: int) -> npt.NDArray[np.uint64]:
    """The keys of the order of an epoch's windows, and a last number for where they begin."""
    return np.random.SeedSequence([seed, shard, epoch]).generate_state(ROUNDS + 1, np.uint64).astype(np.uint64)


@dataclass(frozen=True)
class MixedWindows(RandomWindows):
    """Windows of `shards`, each [tokens], mixed by `weights`.

    A shard has epochs of its own: adjacent windows from a random offset, each once, in random order. No table of them
    is held, so that their number is limited by disks alone.
    """

    shards: Sequence[TokenSource]
    weights: tuple[int, ...]
    context_length: int
    batch_size: int
    seed: int

    def windows(self, numbers: Numbers) -> Numbers:
        shards, before = Mixture(self.weights).places(numbers)
        result = np.empty((len(numbers), self.context_length + 1), np.int64)
        for row, (shard, start) in enumerate(zip(shards.tolist(), self._starts(shards, before).tolist(), strict=True)):
            result[row] = self.shards[shard][start : start + self.context_length + 1]
        return result

    def _starts(self, shards: Numbers, before: Numbers) -> Numbers:
        """The first token of each window, of which `before` come earlier in its shard."""
        sizes = np.array([len(self.shards[shard]) for shard in shards], np.int64)
        counts = np.array([windows_in(size, self.context_length) for size in sizes.tolist()], np.int64)
        epochs, places = np.divmod(before, counts)
        keys = np.stack([_epoch_keys(self.seed, *pair) for pair in zip(shards.tolist(), epochs.tolist(), strict=True)])
        beginnings = (keys[:, -1] % (sizes - counts * self.context_length).astype(np.uint64)).astype(np.int64)
        return beginnings + self.context_length * permuted(places, counts, keys[:, :-1])
