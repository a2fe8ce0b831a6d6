"""Windows of a token file: shuffled for training, sequential for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.text.token_files import TokenSource

IGNORE = -100
"""Target that the loss ignores, as torch's cross_entropy does by default."""


class TrainingBatch:
    """A batch whose fields are tensors with a row for each sequence, or None."""

    inputs: Tensor
    targets: Tensor

    @property
    def num_rows(self) -> int:
        """Number of sequences."""
        return len(self.inputs)

    @property
    def num_targets(self) -> int:
        """Number of targets in the loss."""
        return int((self.targets != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        """Number of input tokens, without padding."""
        return int(self.item_tokens.sum())

    @property
    def item_tokens(self) -> Tensor:
        """[items] the input tokens of each item: a row, or one of several texts in it."""
        return torch.full((self.num_rows,), self.inputs[0].numel())

    @property
    def item_numbers(self) -> Tensor:
        """Shaped as the targets: the number of the item in the batch that each belongs to."""
        rows = torch.arange(self.num_rows)
        return rows.view(-1, *[1] * (self.targets.dim() - 1)).expand_as(self.targets)

    @property
    def whole(self) -> TrainingBatch:
        """The same batch with all of its rows in memory."""
        return self

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainingBatch:
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> TrainingBatch:
        """The same batch in pinned memory, for asynchronous copies."""
        return self._each(lambda tensor: tensor.pin_memory())

    def ready(self, rows: range) -> TrainingBatch:
        """The same batch, with these rows already read."""
        return self

    def rows(self, first: int, last: int) -> TrainingBatch:
        """The rows from `first` to before `last`; if there are none, a first row without targets."""
        if first < last:
            return self._each(lambda tensor: tensor[first:last])
        return self._each(lambda tensor: tensor[:1]).without_targets()

    def split(self, size: int) -> list[TrainingBatch]:
        """Micro-batches of `size` sequences."""
        return [self.rows(first, first + size) for first in range(0, self.num_rows, size)]

    def without_targets(self) -> Self:
        """The same batch, without a target in the loss."""
        return self._each(lambda tensor: torch.full_like(tensor, IGNORE), only={"targets"})

    def _each(self, change: Callable[[Tensor], Tensor], only: Collection[str] = ()) -> Self:
        names = only or [field.name for field in fields(self)]  # type: ignore[arg-type]
        held = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: change(tensor) for name, tensor in held.items()})  # type: ignore[type-var]


class Batches(Protocol):
    """Deterministic batches by index."""

    def __len__(self) -> int: ...

    def batch(self, index: int) -> Any: ...

    def items(self, index: int) -> npt.NDArray[np.int64]:
        """[items] the numbers of the items of batch number `index`, in the order of the data."""
        ...

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, range(len(self)))


@dataclass(frozen=True)
class MadeBatches(Batches):
    """`batches`, changed by `make`, which takes a batch and its index."""

    batches: Batches
    make: Callable[[Any, int], Any]

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, index: int) -> Any:
        return self.make(self.batches.batch(index), index)

    def items(self, index: int) -> npt.NDArray[np.int64]:
        return self.batches.items(index)


@dataclass(frozen=True)
class Batch(TrainingBatch):
    """Token ids, and for each position the next id, or IGNORE."""

    inputs: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]


@dataclass(frozen=True)
class UnreadBatch(TrainingBatch):
    """Windows of text that are read when they are used, so that a rank reads its own rows only.

    `read` gives windows [rows, length + 1] of a range of rows; `held` are rows that were read ahead of time.
    """

    read: Callable[[range], Int64[Tensor, "rows window"]]
    of: range
    length: int
    held: tuple[range, TrainingBatch] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.of)

    @property
    def num_targets(self) -> int:
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.length

    @cached_property
    def whole(self) -> TrainingBatch:
        return self.rows(0, self.num_rows)

    @property
    def inputs(self) -> Tensor:  # type: ignore[override]
        return self.whole.inputs

    @property
    def targets(self) -> Tensor:  # type: ignore[override]
        return self.whole.targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainingBatch:
        return self.whole.to(device, non_blocking)

    def pinned(self) -> TrainingBatch:
        return self if self.held is None else replace(self, held=(self.held[0], self.held[1].pinned()))

    def ready(self, rows: range) -> TrainingBatch:
        return replace(self, held=(rows, self.rows(rows.start, rows.stop)))

    def rows(self, first: int, last: int) -> TrainingBatch:
        if self.held is not None and self.held[0] == range(first, last):
            return self.held[1]
        if first >= last:
            return Batch(*torch.zeros(2, 1, self.length, dtype=torch.int64)).without_targets()
        windows = self.read(self.of[first:last])
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def split(self, size: int) -> list[TrainingBatch]:
        parts = (self.of[first : first + size] for first in range(0, self.num_rows, size))
        return [replace(self, of=part, held=None) for part in parts]


class RandomWindows(ABC):
    """Endless windows; each depends on the seed and its number alone, so that a run can resume anywhere."""

    context_length: int
    batch_size: int

    @abstractmethod
    def windows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The windows [numbers, context_length + 1] with these numbers, counted from 0 over all batches."""

    def batch(self, index: int) -> UnreadBatch:
        """Batch number `index`, which is read when it is used."""
        return UnreadBatch(partial(self._read, index * self.batch_size), range(self.batch_size), self.context_length)

    def _read(self, first: int, rows: range) -> Int64[Tensor, "rows window"]:
        return torch.from_numpy(self.windows(first + np.arange(rows.start, rows.stop)))


@dataclass(frozen=True)
class ShuffledWindows(RandomWindows):
    """Epochs of adjacent windows of `tokens` [tokens] from a random offset, in random order.

    Every token is a target equally often, except up to two windows at the ends of an epoch.
    Raises `UserError` when `tokens` is shorter than one window of `context_length` + 1.
    """

    tokens: TokenSource
    context_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context_length:
            raise UserError(
                f"{len(self.tokens)} tokens are too few for a window of {self.context_length + 1}: "
                "choose a smaller --context-length, or give more text"
            )

    @property
    def windows_per_epoch(self) -> int:
        return windows_in(len(self.tokens), self.context_length)

    def windows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        starts = np.empty((len(numbers), 1), np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            room = len(self.tokens) - self.windows_per_epoch * self.context_length
            order = _epoch_starts(self.windows_per_epoch, self.context_length, room, self.seed, int(epoch))
            starts[inside, 0] = order[places[inside]]
        windows: npt.NDArray[np.int64] = self.tokens[starts + np.arange(self.context_length + 1)].astype(np.int64)
        return windows


def windows_in(tokens: int, length: int) -> int:
    """Number of windows of `length` and its next token in an epoch, which begins at a random offset."""
    return max(1, (tokens - 1) // length - 1)


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_starts(count: int, length: int, room: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The starts of an epoch's windows in their random order; the lowest is below `room`."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    beginning = generator.integers(room)
    return beginning + length * generator.permutation(count)


@dataclass(frozen=True)
class SequentialWindows(Batches):
    """All of `tokens` [tokens] once, in order, in windows: every token but the first is a target once.

    A window begins `stride` tokens after the one before it (default: where that one ends). Where they overlap, the
    targets of the later one are IGNORE, so that each of its own has more than context_length − stride tokens before it.
    The last batch may have fewer rows, and its last row is padded with targets of IGNORE (inputs: the last token).
    """

    tokens: TokenSource
    context_length: int
    batch_size: int
    stride: int | None = None

    @property
    def step(self) -> int:
        """Tokens from the beginning of one window to that of the next."""
        return self.stride or self.context_length

    @property
    def num_windows(self) -> int:
        targets = len(self.tokens) - 1
        return 0 if targets < 1 else 1 + max(0, -(-(targets - self.context_length) // self.step))

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.num_windows // self.batch_size)

    def batch(self, index: int) -> Batch:
        """Batch number `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first, last = index * self.batch_size, min((index + 1) * self.batch_size, self.num_windows)
        before = (last - first - 1) * self.step
        begin = first * self.step
        tokens = self.tokens[begin : begin + before + self.context_length + 1].astype(np.int64)
        length = min(self.context_length, len(tokens) - 1)
        missing = before + length - (len(tokens) - 1)
        read = np.pad(tokens[:-1], (0, missing), mode="edge")
        predicted = np.pad(tokens[1:], (0, missing), constant_values=IGNORE)
        inputs, targets = (sliding_window_view(each, length)[:: self.step].copy() for each in (read, predicted))
        targets[int(first == 0) :, : self.context_length - self.step] = IGNORE
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def items(self, index: int) -> npt.NDArray[np.int64]:
        return np.arange(index * self.batch_size, min((index + 1) * self.batch_size, self.num_windows))
