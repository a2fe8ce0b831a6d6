"""KV cache: keys and values of past tokens, in slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KeysAndValues = tuple[Float[Tensor, "batch heads key head_dim"], Float[Tensor, "batch heads key value_dim"]]
EMPTY = -1
"""the position of a slot that holds no token, or padding"""
FEW = 32
"""minimum slots of a buffer"""


@dataclass(frozen=True)
class Slots:
    """The slots that one forward pass attends to, and those that its own tokens are written to."""

    positions: Int[Tensor, "#batch visible"]
    """position of the token in each visible slot; `EMPTY` for none"""
    new: Int[Tensor, "new"]
    """slots that the new tokens are written to"""
    new_tokens: int
    """their number"""
    visible: int
    """number of slots, from the first, that attention reads"""
    room: int
    """number of slots in the buffers"""
    full: bool
    """whether no visible slot is empty for certain, so that no padding mask is needed"""
    in_order: bool
    """whether the new tokens are in the last visible slots, in order, so that no causal mask is needed"""


def tokens_as_slots(
    positions: Int[Tensor, "#batch length"], is_token: Bool[Tensor, "batch length"] | None = None
) -> Slots:
    """The slots of tokens that attend only to each other, without a cache."""
    length = positions.size(1)
    new = torch.arange(length, device=positions.device)
    return Slots(_held(positions, is_token), new, length, length, length, full=is_token is None, in_order=True)


def _held(positions: Tensor, is_token: Tensor | None) -> Tensor:
    return positions if is_token is None else positions.masked_fill(~is_token, EMPTY)


class LayerCache:
    """The keys and values of one self-attention layer, [batch, heads, slots, features]."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._has_buffers = False

    def update(self, project: Callable[[], KeysAndValues], slots: Slots | None) -> KeysAndValues:
        """All keys and values to attend to; `project` computes the new ones."""
        assert slots is not None, "new keys and values without slots to go to"
        return self.write(*project(), slots)

    def write(
        self, k: Float[Tensor, "batch heads new head_dim"], v: Float[Tensor, "batch heads new value_dim"], slots: Slots
    ) -> KeysAndValues:
        """Write the keys and values of new tokens to their slots; returns those of all visible slots.

        If the first ones fill the cache's slots, they are stored without a copy.
        """
        if self._keys is None and k.size(2) == slots.room:
            self._keys, self._values = k, v
            return k, v
        held_keys, held_values = self._buffers(k, v, k.size(0), slots.room)
        if k.size(0) < held_keys.size(0):
            held_keys, held_values = held_keys.narrow(0, 0, k.size(0)), held_values.narrow(0, 0, k.size(0))
        keys, values = held_keys.narrow(2, 0, slots.visible), held_values.narrow(2, 0, slots.visible)
        if slots.full and slots.in_order:  # a copy to the last slots takes half as long as one to slots that are listed
            keys.narrow(2, -slots.new_tokens, slots.new_tokens).copy_(k)
            values.narrow(2, -slots.new_tokens, slots.new_tokens).copy_(v)
        else:
            held_keys.index_copy_(2, slots.new, k)
            held_values.index_copy_(2, slots.new, v)
        return keys, values

    def put(self, other: LayerCache, rows: list[int] | slice, slots: slice, of: int, room: int) -> None:
        """Copy the first slots of `other`, of one row or of as many, to `slots` of `rows`, some of `of` rows."""
        if other._keys is None or other._values is None:
            return
        keys, values = self._buffers(other._keys, other._values, of, room)
        length = slots.stop - slots.start
        keys[rows, :, slots], values[rows, :, slots] = other._keys[:, :, :length], other._values[:, :, :length]

    def cut(self, row: int, slots: slice) -> LayerCache:
        """A copy of these slots of one row."""
        part = LayerCache()
        if self._keys is not None and self._values is not None:
            part._keys, part._values = (held[row : row + 1, :, slots].clone() for held in (self._keys, self._values))
        return part

    def tensors(self) -> list[Tensor]:
        """The keys and the values, if there are any."""
        return [held for held in (self._keys, self._values) if held is not None]

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Hold these buffers, of another cache."""
        self._keys, self._values, self._has_buffers = keys, values, True

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self.tensors())

    def move(self, slots: slice, to: int) -> None:
        """Copy the contents of these slots to those from `to` on."""
        for buffer in (self._keys, self._values):
            if buffer is not None:
                moved = buffer[:, :, slots].clone()
                buffer[:, :, to : to + moved.size(2)] = moved

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in this order; in place if their number is unchanged."""
        self._keys, self._values = _selected(self._keys, rows), _selected(self._values, rows)

    def _buffers(self, k: Tensor, v: Tensor, rows: int, room: int) -> tuple[Tensor, Tensor]:
        """The contents, in new buffers for `rows` rows of at least `room` slots."""
        if self._keys is None or self._values is None or not self._has_buffers or self._keys.size(2) < room:
            self._keys, self._values = _with_room(self._keys, k, rows, room), _with_room(self._values, v, rows, room)
            self._has_buffers = True
        return self._keys, self._values


def _with_room(held: Tensor | None, like: Tensor, rows: int, room: int) -> Tensor:
    """A zero buffer for `rows` rows of `room` slots, with a copy of the contents."""
    larger = like.new_zeros((rows, like.size(1), room, like.size(3)))
    if held is not None:
        larger[:, :, : held.size(2)] = held
    return larger


def _selected(buffer: Tensor | None, rows: Tensor) -> Tensor | None:
    if buffer is None:
        return None
    chosen = buffer[rows]
    return buffer.copy_(chosen) if chosen.shape == buffer.shape else chosen


class MemoryCache:
    """The keys and values of the memory that one cross-attention layer attends to, projected by the first call."""

    def __init__(self) -> None:
        self._kept: KeysAndValues | None = None

    def update(self, project: Callable[[], KeysAndValues], slots: Slots | None) -> KeysAndValues:
        """As `LayerCache.update`; `slots` are those of the self-attention."""
        if self._kept is None:
            self._kept = project()
        return self._kept

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in this order."""
        if self._kept is not None:
            self._kept = self._kept[0][rows], self._kept[1][rows]


AttentionCache = LayerCache | MemoryCache
"""the cache of one attention layer"""


class KVCache:
    """A `LayerCache` and a `MemoryCache` per layer, cached embeddings, and the position in each slot.

    The caller owns it; no module does. New tokens go to the slots after those in use, or to those that `at`
    chooses. The buffers grow with their contents.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.memories = [MemoryCache() for _ in range(num_layers)]
        self.embeddings = LayerCache()
        self.length = 0
        """slots in use, unless chosen by `at`"""
        self._positions: Int[Tensor, "#rows slots"] | None = None
        self._room, self._full = 0, True

    def next_position(self) -> Int[Tensor, "#rows 1"] | int:
        """The next position of each row."""
        return 0 if self._positions is None else self._positions.amax(-1, keepdim=True) + 1

    def reserve(self, positions: Int[Tensor, "#batch new"], is_token: Bool[Tensor, "batch new"] | None = None) -> Slots:
        """Slots for new tokens, after those in use."""
        first, new = self.length, positions.size(1)
        self.length += new
        assert self.length <= self.max_length, f"{self.length} tokens in a cache for {self.max_length}"
        self._full &= is_token is None
        if self.length > self._room:
            self._room = min(self.max_length, max(2 * self.length, FEW)) if first else new
        slots = torch.arange(first, self.length, device=positions.device)
        held = self.hold(_held(positions, is_token), slots, self.length)
        return Slots(held, slots, new, self.length, self._room, full=self._full, in_order=True)

    def at(
        self,
        slots: Int[Tensor, "new"],
        visible: int,
        *,
        full: bool,
        in_order: bool,
        rows: int | None = None,
        positions: Int[Tensor, "1 visible"] | None = None,
    ) -> ChosenSlots:
        """This cache for a forward pass that writes its tokens to `slots` and attends to the first `visible` slots.

        The tokens are those of the first `rows` rows, if not of all. The buffers have their full size. `full` and
        `in_order` are as in `Slots`, and asserted by the caller. If it knows the `positions` in all visible slots,
        those of the new tokens are not stored.
        """
        return ChosenSlots(self, slots, visible, full, in_order, rows, positions)

    def hold(self, positions: Int[Tensor, "#batch new"], slots: Int[Tensor, "new"], visible: int) -> Tensor:
        """Store the positions of tokens in `slots`; returns those of all visible slots."""
        held = self._positions_of(positions.size(0), positions.device)
        if 1 < positions.size(0) < held.size(0):
            held = held.narrow(0, 0, positions.size(0))
        held.index_copy_(1, slots, positions.expand(held.size(0), -1))
        return held.narrow(1, 0, visible)

    def truncate(self, length: int) -> None:
        """Empty all but the first `length` slots."""
        self.length = min(length, self.length)
        if self._positions is not None:
            self._positions[:, length:] = EMPTY

    def put(self, other: KVCache, rows: list[int], slot: int, of: int) -> None:
        """Replace `rows`, some of `of`, by the contents of `other`, of one row or of as many, from `slot` on."""
        self.clear(rows)
        if other._positions is None:
            return
        # A slice is copied faster than rows that are named.
        chosen = slice(None) if rows == list(range(of)) else rows
        here, there = slice(slot, slot + other.length), slice(0, other.length)
        self._positions_of(of, other._positions.device)[chosen, here] = other._positions[:, there]
        for cache, source in zip(self._of_tokens, other._of_tokens, strict=True):
            cache.put(source, chosen, here, of, self.max_length)

    def cut(self, row: int, slots: slice) -> KVCache:
        """A copy of these slots of one row, without their positions."""
        part = KVCache(len(self.layers), slots.stop - slots.start)
        part.layers = [layer.cut(row, slots) for layer in self.layers]
        part.embeddings, part.length = self.embeddings.cut(row, slots), part.max_length
        return part

    def preload(self, parts: Sequence[KVCache]) -> int:
        """Begin one row with `parts` that were cut, one after another, at positions from 0; returns its length."""
        for part in parts:
            here = slice(self.length, self.length + part.length)
            for cache, source in zip(self._of_tokens, part._of_tokens, strict=True):
                cache.put(source, [0], here, 1, self.max_length)
            self.length = here.stop
        if parts:
            device = next(keys.device for layer in parts[0].layers if (keys := layer._keys) is not None)
            slots = torch.arange(self.length, device=device)
            self.hold(slots[None], slots, self.length)
            self._room = self.max_length
        return self.length

    def clear(self, rows: list[int]) -> None:
        """Empty these rows."""
        if self._positions is not None:
            self._positions[rows] = EMPTY

    def move(self, slots: slice, to: int) -> None:
        """Move the contents of these slots of all rows to those from `to` on; every other slot is empty then."""
        for cache in self._of_tokens:
            cache.move(slots, to)
        if self._positions is not None:
            moved = self._positions[:, slots].clone()
            self._positions.fill_(EMPTY)
            self._positions[:, to : to + moved.size(1)] = moved

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in this order; rows may repeat."""
        self.reorder(rows)
        for memory in self.memories:
            memory.select(rows)

    def reorder(self, rows: Int[Tensor, "batch"]) -> None:
        """`select`, where each row is replaced by one with the same memory, as in beam search."""
        for cache in self._of_tokens:
            cache.select(rows)
        if self._positions is not None and self._positions.size(0) > 1:
            self._positions = _selected(self._positions, rows)

    def tensors(self) -> list[Tensor]:
        """All tensors of a decoder's cache: keys and values of each layer, those of embeddings, and positions."""
        positions = [] if self._positions is None else [self._positions]
        return [*chain.from_iterable(cache.tensors() for cache in self._of_tokens), *positions]

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Hold the `tensors()` of a filled cache, or all but the positions."""
        for cache, keys, values in zip(self._of_tokens, tensors[::2], tensors[1::2], strict=False):
            cache.adopt(keys, values)
        if len(tensors) % 2:
            self._positions = tensors[-1]

    @property
    def nbytes(self) -> int:
        """Memory of keys, values and cached embeddings."""
        return sum(cache.nbytes for cache in self._of_tokens)

    def _positions_of(self, rows: int, device: torch.device) -> Int[Tensor, "#rows slots"]:
        """The positions, separate for each of `rows` rows if they may differ."""
        if self._positions is None:
            self._positions = torch.full((rows, self.max_length), EMPTY, device=device)
        elif self._positions.size(0) < rows:
            self._positions = self._positions.repeat(rows, 1)
        return self._positions

    @property
    def _of_tokens(self) -> list[LayerCache]:
        """The caches that grow with the tokens."""
        return [*self.layers, self.embeddings]


@dataclass(frozen=True)
class ChosenSlots:
    """A `KVCache` for one forward pass with slots chosen by the caller: `KVCache.at`."""

    cache: KVCache
    new: Int[Tensor, "new"]
    visible: int
    full: bool
    in_order: bool
    rows: int | None = None
    positions: Int[Tensor, "1 visible"] | None = None

    @property
    def layers(self) -> list[LayerCache]:
        return self.cache.layers

    @property
    def memories(self) -> list[MemoryCache]:
        return self.cache.memories

    @property
    def embeddings(self) -> LayerCache:
        return self.cache.embeddings

    def next_position(self) -> Int[Tensor, "#rows 1"] | int:
        return self.cache.next_position()

    def reserve(self, positions: Int[Tensor, "#batch new"], is_token: Bool[Tensor, "batch new"] | None = None) -> Slots:
        """The chosen slots, for tokens at these positions."""
        held = self.positions
        if held is None:
            held = self.cache.hold(_held(positions, is_token), self.new, self.visible)
        if self.rows is not None and self.rows < held.size(0):
            held = held.narrow(0, 0, self.rows)
        return Slots(held, self.new, len(self.new), self.visible, self.cache.max_length, self.full, self.in_order)
