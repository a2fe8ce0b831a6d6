"""What prompts begin with in common: its keys and values are kept, so that the next prompt need not read it again.

Kwon et al. 2023 (vLLM, arXiv 2309.06180), section 4.4; Zheng et al. 2023 (SGLang, arXiv 2312.07104), section 3.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from minitransformer.architecture.cache import KVCache

BLOCK = 32
"""tokens"""


class PrefixCache:
    """Keys and values of the beginnings of prompts, in blocks, for at most `most_tokens` tokens.

    A block is found by all tokens up to its end. Those that were used least recently make room for new ones: of one
    beginning the last block first, without which the others are still of use.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens // BLOCK
        self._blocks: OrderedDict[bytes, KVCache] = OrderedDict()
        self.reused_tokens = 0
        """of all prompts so far, those that were not read again"""

    @property
    def num_tokens(self) -> int:
        """Tokens that are held."""
        return len(self._blocks) * BLOCK

    def longest(self, tokens: Sequence[int]) -> list[KVCache]:
        """The blocks that `tokens` begin with."""
        found = []
        for name in _names(tokens):
            if name not in self._blocks:
                break
            found.append(name)
        self._touch(found)
        self.reused_tokens += len(found) * BLOCK
        return [self._blocks[name] for name in found]

    def keep(self, tokens: Sequence[int], cache: KVCache, row: int) -> None:
        """Keep what `tokens` begin with, whose keys and values are in a row of `cache`."""
        names = list(_names(tokens))[: self._most]
        for number, name in enumerate(names):
            if name not in self._blocks:
                self._blocks[name] = cache.cut(row, slice(number * BLOCK, (number + 1) * BLOCK))
        self._touch(names)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def _touch(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):
            self._blocks.move_to_end(name)


def _names(tokens: Sequence[int]) -> Iterator[bytes]:
    """A digest of all tokens up to the end of each whole block."""
    digest = blake2b(digest_size=16)
    for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
        digest.update(array("q", tokens[begin : begin + BLOCK]).tobytes())
        yield digest.digest()


def common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with in common."""
    lowest, highest = min(sequences), max(sequences)  # whatever is between them has it too
    pairs = zip(lowest, highest, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(lowest), len(highest)))
