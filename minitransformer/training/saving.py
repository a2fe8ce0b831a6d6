"""Saving beside training: state is copied between two steps, and a thread writes the copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from minitransformer import files
from minitransformer.models.model import Model
from minitransformer.training.checkpoint import remove_old_checkpoints, write_state
from minitransformer.training.config import RunConfig
from minitransformer.training.logging import Log
from minitransformer.training.parallel import Parallel
from minitransformer.training.shard_writer import ShardWriter
from minitransformer.training.weights import stored_tensors

SECONDS_TO_ASK = 1.0
"""after how long ranks that wait for a checkpoint ask whether it is written"""
SECONDS_FOR_OTHERS = 10.0
"""how long a rank that ends with an error waits for the others to complete a checkpoint"""


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time.

    All ranks call its methods alike. The main one writes; where ranks keep parts of the weights, each writes its own.
    A context manager: if its block ends normally or with an error, the last checkpoint is completed; if it is
    interrupted, as by Ctrl-C, an unfinished one is removed.
    """

    def __init__(self, folder: Path, config: RunConfig, log: Log, parallel: Parallel) -> None:
        self.folder, self.config, self.log, self.parallel = folder, config, log, parallel
        self.ranks = parallel.ranks
        self.writes = self.ranks.is_main or parallel.shards_weights
        self.write_state = ShardWriter().write_state if parallel.shards_weights else write_state
        self._buffers = Buffers()
        self._writing: Future[None] | None = None
        self._interrupted = Event()

    def __enter__(self) -> Saver:
        self._interrupted.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
            return
        if not issubclass(kind, Exception):
            self._interrupted.set()
        if self._writing is not None:  # the error of the block is the one to report
            wait_for([self._writing], SECONDS_FOR_OTHERS if self.parallel.shards_weights else None)

    def save(self, step: int, model: Model, state: dict[str, Any], *, best: bool, also_before: Iterable[int]) -> None:
        """Begin to write the checkpoint of `step`; returns once everything in it is copied.

        Raises the error of the checkpoint before it. `best` and `also_before` say which checkpoints are kept.
        """
        self.wait()
        if not self.writes:
            return
        (tensors, state), wait_for_device = self._buffers.copy((stored_tensors(model), state))

        def write() -> None:
            wait_for_device()
            self.log.sync()  # first, so that no checkpoint is ahead of the logs
            path = self.write_state(self.folder, step, tensors, state, self.config, go_on=self._go_on, base=model.base)
            if self.ranks.is_main:
                if best:
                    files.point_to(self.folder / "best", path.name)
                remove_old_checkpoints(self.folder, self.config.training.keep_last, also_before=also_before)

        # The process may end while the thread waits for a rank that does not answer, but not while it writes alone.
        self._writing = begun(write, daemon=self.parallel.shards_weights)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as this rank knows; `wait` says why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raises the error of the main rank on all of them."""
        writing, self._writing = self._writing, None
        # A slow disk may take longer than a collective operation may; a rank that does not answer is noticed here.
        while self.ranks.any(writing is not None and bool(wait_for([writing], SECONDS_TO_ASK).not_done)):
            pass
        error = None if writing is None else writing.exception()

        def check() -> None:
            if error is not None:
                raise error

        self.ranks.from_main(check)
        check()

    def _go_on(self) -> None:
        if self._interrupted.is_set():
            raise InterruptedError("training was interrupted")


def begun(work: Callable[[], None], *, daemon: bool) -> Future[None]:
    """`work`, begun in a thread of its own, for which the end of the process waits unless it is a `daemon`."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    Thread(target=run, name="checkpoint", daemon=daemon).start()
    return future


class Buffers:
    """Memory of the CPU for copies of nested state, which each copy reuses."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """A copy of `state` on the CPU, and what to call before it is read.

        Copies from CUDA are queued before the next step's work, which this process need not wait for.
        """
        copied = self._copied(state, ())
        if not torch.cuda.is_initialized():
            return copied, lambda: None
        done, device = torch.cuda.Event(blocking=True), torch.cuda.current_device()
        done.record()

        def wait() -> None:
            torch.cuda.set_device(device)  # a thread begins with the first one
            done.synchronize()

        return copied, wait

    def _copied(self, state: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(state, dict):
            return {key: self._copied(value, (*place, key)) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self._copied(value, (*place, index)) for index, value in enumerate(state))
        if not isinstance(state, Tensor):
            return state
        tensor, buffer = state.detach(), self._tensors.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._tensors[place] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)
