"""The processes of a run: one, or as many as `torchrun` has started."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from minitransformer.errors import StorageError, UserError

T = TypeVar("T")


class Ranks:
    """The ranks of a run, each a process; this base class is one process, for which every operation is the identity.

    All ranks must call the same methods in the same order. What they call before they know better is decided on all
    of them together: a rank never decides alone.
    """

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks."""
        return x

    def largest(self, number: int) -> int:
        """The largest `number` of all ranks."""
        return number

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return bool(self.largest(flag))

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes; a `UserError` or an `OSError` there is raised on all ranks."""
        return make()

    def all(self, value: T) -> list[T]:
        """The `value` of each rank."""
        return [value]

    def main_first(self, make: Callable[[], T], open: Callable[[], T]) -> T:
        """What rank 0 makes, and the others `open` then; a `UserError` of rank 0 is raised on all ranks."""
        made: list[T] = []
        self.from_main(lambda: made.append(make()))
        return made[0] if self.is_main else open()

    def share(self, count: int) -> range:
        """This rank's part of `count` rows: all parts are adjacent and differ by one row at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


ONE_PROCESS = Ranks()


class ErrorOfMain(UserError):
    """An error of rank 0, raised on the other ranks."""

    reported = True

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.exit_code = getattr(error, "exit_code", StorageError.exit_code)


class Processes(Ranks):
    """Several processes, joined by `torch.distributed`: gloo for tensors on a CPU, NCCL on CUDA."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def sum(self, x: Tensor) -> Tensor:
        from torch.distributed import all_reduce

        total = x.clone()
        all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        from torch.distributed import ReduceOp, all_reduce

        most = torch.tensor(number)  # on the CPU: a GPU need not be waited for
        all_reduce(most, ReduceOp.MAX)
        return int(most)

    def from_main(self, make: Callable[[], T]) -> T:
        from torch.distributed import broadcast_object_list

        made: list[Any] = [None]
        if self.is_main:
            try:
                made = [make()]
            except (UserError, OSError) as error:
                made = [error]
        broadcast_object_list(made, device=torch.device("cpu"))
        if isinstance(made[0], UserError | OSError):
            raise made[0] if self.is_main else ErrorOfMain(made[0])
        return made[0]

    def all(self, value: T) -> list[T]:
        from torch.distributed import all_gather_object

        values: list[Any] = [None] * self.size
        all_gather_object(values, value)
        return values


@contextmanager
def joined_ranks(timeout: float) -> Iterator[Ranks]:
    """The ranks that `torchrun` has started, joined; one process without it.

    A collective operation that takes more than `timeout` seconds raises an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ONE_PROCESS
        return
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backends, timeout=timedelta(seconds=timeout))
    try:
        yield Processes()
        distributed.barrier()  # a rank that leaves early is taken for a dead one
    finally:
        gc.collect()  # what still holds the group, in cycles, aborts the process at its exit
        distributed.destroy_process_group()


@contextmanager
def spoken_by_main() -> Iterator[None]:
    """Standard output is that of rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
