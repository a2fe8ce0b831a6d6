"""Keys and values of the tokens already read, in slots, so that decoding reads each token once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KeysAndValues = tuple[Float[Tensor, "batch heads key head_dim"], Float[Tensor, "batch heads key value_dim"]]
EMPTY = -1
"""the position of a slot that holds no token, or padding"""
FEW = 32
"""slots that buffers have at least"""


@dataclass(frozen=True)
class Slots:
    """The keys that one forward pass attends to, slot by slot, and the slots among them of its own tokens."""

    positions: Int[Tensor, "#batch visible"]
    """of the token in each visible slot, `EMPTY` where there is none"""
    new: Int[Tensor, "new"]
    """the slots that the new tokens go to"""
    visible: int
    """attention sees the first so many slots"""
    room: int
    """slots that the buffers have: no pass sees more without larger ones"""
    full: bool
    """whether it is certain that no visible slot is empty: then they need no mask"""
    in_order: bool
    """whether the new tokens are in the last visible slots, in their order: then kernels need no mask for causality"""


def tokens_as_slots(
    positions: Int[Tensor, "#batch length"], is_token: Bool[Tensor, "batch length"] | None = None
) -> Slots:
    """The slots of tokens that attend to each other alone, without a cache."""
    length = positions.size(1)
    new = torch.arange(length, device=positions.device)
    return Slots(_held(positions, is_token), new, length, length, full=is_token is None, in_order=True)


def _held(positions: Tensor, is_token: Tensor | None) -> Tensor:
    return positions if is_token is None else positions.masked_fill(~is_token, EMPTY)


@runtime_checkable
class AttentionCache(Protocol):
    """What one attention layer remembers from one call to the next."""

    def update(self, project: Callable[[], KeysAndValues], slots: Slots | None) -> KeysAndValues:
        """All keys and values to attend to; `project` computes those of this call."""
        ...


class LayerCache:
    """The keys and values of one self-attention layer, [batch, heads, slots, features]."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._has_buffers = False

    def update(self, project: Callable[[], KeysAndValues], slots: Slots | None) -> KeysAndValues:
        assert slots is not None, "new keys and values without slots to go to"
        return self.write(*project(), slots)

    def write(
        self, k: Float[Tensor, "batch heads new head_dim"], v: Float[Tensor, "batch heads new value_dim"], slots: Slots
    ) -> KeysAndValues:
        """Put the keys and values of new tokens into their slots; returns those of all visible slots.

        The first ones are kept as they are where no more have room: a prompt is not copied before there are more.
        """
        if self._keys is None and k.size(2) == slots.room:
            self._keys, self._values = k, v
            return k, v
        held_keys, held_values = self._buffers(k, v, k.size(0), slots.room)
        keys, values = held_keys.index_copy_(2, slots.new, k), held_values.index_copy_(2, slots.new, v)
        return keys.narrow(2, 0, slots.visible), values.narrow(2, 0, slots.visible)

    def put(self, other: LayerCache, rows: list[int], slots: slice, of: int, room: int) -> None:
        """The first slots of `other`, of one row or of as many, go to `slots` of these rows, of `of` that there are."""
        if other._keys is None or other._values is None:
            return
        keys, values = self._buffers(other._keys, other._values, of, room)
        length = slots.stop - slots.start
        keys[rows, :, slots], values[rows, :, slots] = other._keys[:, :, :length], other._values[:, :, :length]

    def roll(self, slots: int) -> None:
        """What is in a slot goes so many further; what leaves at one end comes back at the other."""
        for buffer in (self._keys, self._values):
            if buffer is not None:
                buffer.copy_(buffer.roll(slots, 2))

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in their order; as many as before are written where the others were."""
        self._keys, self._values = _selected(self._keys, rows), _selected(self._values, rows)

    def _buffers(self, k: Tensor, v: Tensor, rows: int, room: int) -> tuple[Tensor, Tensor]:
        """What is held, in buffers of its own for `rows` rows of at least `room` slots."""
        if self._keys is None or self._values is None or not self._has_buffers or self._keys.size(2) < room:
            self._keys, self._values = _with_room(self._keys, k, rows, room), _with_room(self._values, v, rows, room)
            self._has_buffers = True
        return self._keys, self._values


def _with_room(held: Tensor | None, like: Tensor, rows: int, room: int) -> Tensor:
    """A copy of what is held, in zeros for `rows` rows of `room` slots."""
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
        if self._kept is None:
            self._kept = project()
        return self._kept

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in their order."""
        if self._kept is not None:
            self._kept = self._kept[0][rows], self._kept[1][rows]


class KVCache:
    """A `LayerCache` and a `MemoryCache` for each layer, what a stack keeps of the embeddings, and who is in each slot.

    Whoever generates makes it; no module keeps it. New tokens go to the slots after those in use, or to those that `at`
    chooses. The buffers grow with what they hold, so that few tokens cost little.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.memories = [MemoryCache() for _ in range(num_layers)]
        self.embeddings = LayerCache()
        self.length = 0
        """slots in use, where nobody chooses"""
        self._positions: Int[Tensor, "#rows slots"] | None = None
        self._room, self._full = 0, True

    def next_position(self) -> Int[Tensor, "#rows 1"] | int:
        """The position after the last one that each row holds."""
        return 0 if self._positions is None else self._positions.amax(-1, keepdim=True) + 1

    def reserve(self, positions: Int[Tensor, "#batch new"], is_token: Bool[Tensor, "batch new"] | None = None) -> Slots:
        """The slots of new tokens, which follow those in use."""
        first, new = self.length, positions.size(1)
        self.length += new
        assert self.length <= self.max_length, f"{self.length} tokens in a cache for {self.max_length}"
        self._full &= is_token is None
        if self.length > self._room:
            self._room = min(self.max_length, max(2 * self.length, FEW)) if first else new
        slots = torch.arange(first, self.length, device=positions.device)
        held = self.hold(_held(positions, is_token), slots, self.length)
        return Slots(held, slots, self.length, self._room, full=self._full, in_order=True)

    def at(self, slots: Int[Tensor, "new"], visible: int, *, full: bool, in_order: bool) -> ChosenSlots:
        """This cache for a forward pass whose tokens go to `slots`, and which attends to the first `visible` slots.

        The buffers are whole from the start. `full` and `in_order` are the caller's knowledge of what `Slots` says.
        """
        return ChosenSlots(self, slots, visible, full, in_order)

    def hold(self, positions: Int[Tensor, "#batch new"], slots: Int[Tensor, "new"], visible: int) -> Tensor:
        """Note the positions of the tokens that are in `slots` from now on; returns those of all visible slots."""
        held = self._positions_of(positions.size(0), positions.device)
        held.index_copy_(1, slots, positions.expand(held.size(0), -1))
        return held.narrow(1, 0, visible)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(length, self.length)
        if self._positions is not None:
            self._positions[:, self.length :] = EMPTY

    def put(self, other: KVCache, rows: list[int], slot: int, of: int) -> None:
        """What `other`, of one row or of as many, has read goes to these rows of `of` here, from `slot` on.

        They hold nothing else then.
        """
        self.clear(rows)
        if other._positions is None:
            return
        here, there = slice(slot, slot + other.length), slice(0, other.length)
        self._positions_of(of, other._positions.device)[rows, here] = other._positions[:, there]
        for cache, source in zip(self._of_tokens, other._of_tokens, strict=True):
            cache.put(source, rows, here, of, self.max_length)

    def clear(self, rows: list[int]) -> None:
        """The rows hold no token."""
        if self._positions is not None:
            self._positions[rows] = EMPTY

    def roll(self, slots: int) -> None:
        """What is in a slot goes so many further, in all rows."""
        for cache in self._of_tokens:
            cache.roll(slots)
        if self._positions is not None:
            self._positions.copy_(self._positions.roll(slots, 1))

    def select(self, rows: Int[Tensor, "selected"]) -> None:
        """Keep the given rows of the batch, in their order: one may be given several times."""
        self.reorder(rows)
        for memory in self.memories:
            memory.select(rows)

    def reorder(self, rows: Int[Tensor, "batch"]) -> None:
        """`select` for rows that are exchanged only with rows that attend to the same memory, as beams are."""
        for cache in self._of_tokens:
            cache.select(rows)
        if self._positions is not None and self._positions.size(0) > 1:
            self._positions = _selected(self._positions, rows)

    def _positions_of(self, rows: int, device: torch.device) -> Int[Tensor, "#rows slots"]:
        """The positions, apart for each of `rows` rows if these can differ."""
        if self._positions is None:
            self._positions = torch.full((rows, self.max_length), EMPTY, device=device)
        elif self._positions.size(0) < rows:
            self._positions = self._positions.repeat(rows, 1)
        return self._positions

    @property
    def _of_tokens(self) -> list[LayerCache]:
        """What grows with the tokens that are read."""
        return [*self.layers, self.embeddings]


@dataclass(frozen=True)
class ChosenSlots:
    """A `KVCache` for one forward pass, whose slots the caller has chosen: `KVCache.at`."""

    cache: KVCache
    new: Int[Tensor, "new"]
    visible: int
    full: bool
    in_order: bool

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
        held = self.cache.hold(_held(positions, is_token), self.new, self.visible)
        return Slots(held, self.new, self.visible, self.cache.max_length, self.full, self.in_order)
