"""Steps that run out of memory: halved micro-batches, or a sentence with the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.text.batches import TrainingBatch
from minitransformer.training.ranks import Ranks

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
"""parts of the messages of a RuntimeError of torch: of CUDA and MPS, of the CPU's allocator, of C++, of cuBLAS"""


class OutOfMemory(UserError):
    """A step that does not fit into memory."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory could not be allocated."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class MicroBatches:
    """Divides the micro-batches of every step into halves, as often as memory has run out.

    The rows of a step stay the same, and so do its loss and its gradient, but for rounding.
    """

    def __init__(self, batch_size: int, may_halve: bool, ranks: Ranks) -> None:
        self.batch_size, self.may_halve, self.ranks, self.halvings = batch_size, may_halve, ranks, 0

    def compute(
        self,
        batches: Sequence[TrainingBatch],
        add_gradients: Callable[[Sequence[TrainingBatch]], Tensor],
        drop_gradients: Callable[[], object],
    ) -> Tensor:
        """The loss that `add_gradients` returns for the parts of `batches`; halves them until they fit into memory.

        Raises `OutOfMemory` if they may not be halved, or cannot be; all ranks halve them, or none.
        """
        while True:
            parts = [part for batch in batches for part in parts_of(batch, self.halvings)]
            loss, reason = _attempt(add_gradients, parts)
            # Ranks that may not halve do not ask each other: the others may wait for gradients already.
            others_fit = not self.may_halve or not self.ranks.any(loss is None)
            if loss is not None and others_fit:
                return loss
            drop_gradients()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(max(part.num_rows for part in parts), reason)

    def __str__(self) -> str:
        return (
            f"out of memory, so that each micro-batch is now divided into {1 << self.halvings}; the rows of a step "
            "are the same"
        )

    def _halve(self, rows: int, reason: str) -> None:
        most = f"the memory does not hold a micro-batch of {rows} sequence{'s' * (rows != 1)} ({reason})"
        if rows == 1:
            raise OutOfMemory(f"{most}: choose a smaller --sequence-length or a smaller model")
        if not self.may_halve:
            raise OutOfMemory(
                f"{most}: give --on-oom halve, or halve --batch-size and double --grad-accumulation, which changes "
                "nothing else"
            )
        self.halvings += 1

    def state_dict(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "halvings": self.halvings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; another batch size is tried as it is."""
        self.halvings = state["halvings"] if state["batch_size"] == self.batch_size else 0


def parts_of(batch: TrainingBatch, halvings: int) -> list[TrainingBatch]:
    """`batch` in 2 to the power of `halvings` parts of as many rows, fewer where there are fewer rows."""
    return batch.split(-(-batch.num_rows >> halvings)) if halvings else [batch]


def _attempt(
    add_gradients: Callable[[Sequence[TrainingBatch]], Tensor], parts: Sequence[TrainingBatch]
) -> tuple[Tensor | None, str]:
    """The result of `add_gradients`, or None and why memory ran out; afterwards the memory of a failure is free."""
    try:
        return add_gradients(parts), "on another rank"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).partition("\n")[0] or type(error).__name__
