"""Windows of a token file: in random order to train on, one after the other to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.text.token_files import Tokens

IGNORE = -100
"""A target that counts in no loss; torch's cross_entropy ignores it by default."""


class TrainingBatch(Protocol):
    """What the loop must know of a batch, whatever is in it."""

    @property
    def num_targets(self) -> int:
        """How many predictions count in the loss."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many tokens the model reads."""
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self: ...


class Batches(Protocol):
    """Batches by number, each the same whenever it is asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def batch(self, index: int) -> Any: ...


@dataclass(frozen=True)
class MadeBatches:
    """`count` batches, of which `batch` makes any by its number."""

    count: int
    batch: Callable[[int], Any]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, range(self.count))


@dataclass(frozen=True)
class Batch:
    """Token ids, and for each position the id that follows it, or IGNORE."""

    inputs: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        return self.inputs.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on `device`."""
        return type(self)(
            self.inputs.to(device, non_blocking=non_blocking), self.targets.to(device, non_blocking=non_blocking)
        )

    def split(self, size: int) -> list[Self]:
        """Micro-batches of `size` sequences."""
        pairs = zip(self.inputs.split(size), self.targets.split(size), strict=True)
        return [type(self)(inputs, targets) for inputs, targets in pairs]


@dataclass(frozen=True)
class ShuffledWindows:
    """Epochs of windows of `tokens` [tokens]: side by side from a random beginning, in random order.

    So every token is learned from as often as any other, but for up to two windows at the ends of an epoch.
    Raises `UserError` when `tokens` holds not one window of `context_length` + 1.
    """

    tokens: Tokens
    context_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context_length:
            raise UserError(
                f"{len(self.tokens)} tokens hold no window of {self.context_length + 1}: "
                "choose a smaller --context-length, or give more text"
            )

    @property
    def windows_per_epoch(self) -> int:
        return max(1, (len(self.tokens) - 1) // self.context_length - 1)

    def batch(self, index: int) -> Batch:
        """Batch number `index`: a function of seed and index alone, so a run resumes, or skips, at any of them."""
        epochs, places = np.divmod(index * self.batch_size + np.arange(self.batch_size), self.windows_per_epoch)
        starts = np.empty((self.batch_size, 1), np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            room = len(self.tokens) - self.windows_per_epoch * self.context_length
            order = _epoch_starts(self.windows_per_epoch, self.context_length, room, self.seed, int(epoch))
            starts[inside, 0] = order[places[inside]]
        windows = torch.from_numpy(self.tokens[starts + np.arange(self.context_length + 1)].astype(np.int64))
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _epoch_starts(count: int, length: int, room: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where the windows of an epoch begin, in the order in which they come: the first of them below `room`."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    beginning = generator.integers(room)
    return beginning + length * generator.permutation(count)


@dataclass(frozen=True)
class SequentialWindows:
    """All of `tokens` [tokens] once, in order, in windows side by side: every token but the first is one target.

    The last batch may have fewer rows, and its last row is padded with targets of IGNORE (inputs: the last token).
    """

    tokens: Tokens
    context_length: int
    batch_size: int

    def __len__(self) -> int:
        """How many batches."""
        return max(0, -(-(len(self.tokens) - 1) // (self.context_length * self.batch_size)))

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(len(self)))

    def batch(self, index: int) -> Batch:
        """Batch number `index`, so that several processes can share the work."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        span = self.context_length * self.batch_size
        tokens = self.tokens[index * span : (index + 1) * span + 1].astype(np.int64)
        length = min(self.context_length, len(tokens) - 1)
        missing = -(len(tokens) - 1) % length
        inputs = np.pad(tokens[:-1], (0, missing), mode="edge").reshape(-1, length)
        targets = np.pad(tokens[1:], (0, missing), constant_values=IGNORE).reshape(-1, length)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
