"""Keys and values of the tokens already read, so that decoding reads each token once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

KeysAndValues = tuple[Float[Tensor, "batch heads key head_dim"], Float[Tensor, "batch heads key value_dim"]]


@runtime_checkable
class AttentionCache(Protocol):
    """What one attention layer remembers from one call to the next."""

    def update(self, project: Callable[[], KeysAndValues]) -> KeysAndValues:
        """All keys and values to attend to; `project` computes those of this call."""
        ...


class LayerCache:
    """The keys and values of one self-attention layer, for at most `max_length` tokens.

    The buffers grow with what they hold, so that few tokens cost little; with `slots` they are whole from the start,
    and their first `seen` slots are looked at.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = self.seen = max_length
        self.length = 0
        self.slots: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, project: Callable[[], KeysAndValues]) -> KeysAndValues:
        return self.append(*project())

    def append(
        self, k: Float[Tensor, "batch heads new head_dim"], v: Float[Tensor, "batch heads new value_dim"]
    ) -> KeysAndValues:
        """Add the keys and values of new tokens; returns those of all tokens so far.

        With `slots`, the new ones go there, and those of all slots that are seen are returned. Without, the first ones
        are kept as they are: a prompt is not copied before there are more.
        """
        if self.slots is not None:
            self._keys, self._values = self._with_room(self._keys, k), self._with_room(self._values, v)
            keys, values = self._keys.index_copy_(2, self.slots, k), self._values.index_copy_(2, self.slots, v)
            return keys.narrow(2, 0, self.seen), values.narrow(2, 0, self.seen)
        start, self.length = self.length, self.length + k.size(2)
        assert self.length <= self.max_length, f"{self.length} tokens in a cache for {self.max_length}"
        if self._keys is None or self._values is None:
            self._keys, self._values = k, v
            return k, v
        self._keys, self._values = self._with_room(self._keys, k), self._with_room(self._values, v)
        self._keys[:, :, start : self.length] = k
        self._values[:, :, start : self.length] = v
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def _with_room(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """`buffer`, or a larger copy, with room for `length` tokens like `new`, or for all if there are slots."""
        if buffer is not None and buffer.size(2) >= (self.length if self.slots is None else self.max_length):
            return buffer
        room = self.max_length if self.slots is not None else min(self.max_length, max(2 * self.length, 32))
        larger = new.new_zeros((*new.shape[:2], room, new.size(3)))
        if buffer is not None:
            larger[:, :, : buffer.size(2)] = buffer
        return larger

    def put(self, other: LayerCache, row: int, slot: int, rows: int) -> None:
        """What `other` holds, of one row, goes to a row of the `rows` here, from `slot` on."""
        if other._keys is None or other._values is None:
            return
        if self._keys is None or self._values is None:
            self._keys, self._values = (
                held.new_zeros((rows, held.size(1), self.max_length, held.size(3)))
                for held in (other._keys, other._values)
            )
        self._keys[row, :, slot : slot + other.length] = other._keys[0, :, : other.length]
        self._values[row, :, slot : slot + other.length] = other._values[0, :, : other.length]

    def roll(self, slots: int) -> None:
        """What is in a slot goes so many further; what leaves at one end comes back at the other."""
        for buffer in (self._keys, self._values):
            if buffer is not None:
                buffer.copy_(buffer.roll(slots, 2))

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in their order; as many as before are written where the others were."""
        self._keys, self._values = _selected(self._keys, rows), _selected(self._values, rows)


class MemoryCache:
    """The keys and values of the memory that one cross-attention layer attends to, projected by the first call."""

    def __init__(self) -> None:
        self._kept: KeysAndValues | None = None

    def update(self, project: Callable[[], KeysAndValues]) -> KeysAndValues:
        if self._kept is None:
            self._kept = project()
        return self._kept

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in their order."""
        if self._kept is not None:
            self._kept = self._kept[0][rows], self._kept[1][rows]


def _selected(buffer: Tensor | None, rows: Tensor) -> Tensor | None:
    if buffer is None:
        return None
    chosen = buffer[rows]
    # A recorded step writes to the tensor that it was recorded with.
    return buffer.copy_(chosen) if chosen.shape == buffer.shape else chosen


class KVCache:
    """A `LayerCache` and a `MemoryCache` for each layer, and what a stack keeps of the embeddings, if anything.

    Whoever generates makes it; no module keeps it.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.newest_last = False
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]
        self.memories = [MemoryCache() for _ in range(num_layers)]
        self.embeddings = LayerCache(max_length)

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return self.layers[0].length

    @property
    def slots(self) -> Int[Tensor, "new"] | None:
        """Where the next tokens go, if `place` has said so; otherwise they follow those already read."""
        return self.layers[0].slots

    @property
    def seen(self) -> int:
        """How many slots attention sees, if `place` has said where the next tokens go."""
        return self.layers[0].seen

    def place(self, slots: Int[Tensor, "new"] | None, seen: int | None = None, *, newest_last: bool = False) -> None:
        """The next tokens go to these slots; attention then sees the first `seen` slots (default: all).

        A mask says which of them count. So every step that sees as many has the same shapes, whatever has been read:
        what recording and compiling ask for. With `newest_last`, the newest token is in the last slot that is seen, and
        needs no mask.
        """
        self.newest_last = newest_last
        for cache in self._of_tokens:
            cache.slots, cache.seen = slots, self.max_length if seen is None else seen

    @property
    def _of_tokens(self) -> list[LayerCache]:
        """What grows with the tokens that are read."""
        return [*self.layers, self.embeddings]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for cache in self._of_tokens:
            cache.length = min(length, cache.length)

    def put(self, other: KVCache, row: int, slot: int, rows: int) -> None:
        """What `other`, of one row, has read goes to a row of the `rows` here, from `slot` on."""
        for cache, source in zip(self._of_tokens, other._of_tokens, strict=True):
            cache.put(source, row, slot, rows)

    def roll(self, slots: int) -> None:
        """What is in a slot goes so many further, in all rows."""
        for cache in self._of_tokens:
            cache.roll(slots)

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in their order: one may be given several times."""
        self.reorder(rows)
        for memory in self.memories:
            memory.select(rows)

    def reorder(self, rows: Int[Tensor, "batch"]) -> None:
        """`select` for rows that are exchanged only with rows that attend to the same memory, as beams are."""
        for cache in self._of_tokens:
            cache.select(rows)
