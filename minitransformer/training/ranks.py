"""The processes of a run: one, or as many as `torchrun` has started."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from minitransformer.errors import StorageError, UserError
from minitransformer.processes import is_launched, processors
from minitransformer.training.launch import (
    RUN,
    earlier_end,
    launcher_command,
    meet,
    note_end,
    number_from_launcher,
    open_store,
)
from minitransformer.training.watch import Watch

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)


class Ranks:
    """The ranks of a run, each a process; this base class is one process, for which every operation is the identity.

    All ranks must call the same methods in the same order. What they call before they know better is decided on all
    of them together: a rank never decides alone.
    """

    rank, size = 0, 1
    begun: Path | None = None
    """the run that these ranks, started anew by `torchrun`, have begun before"""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs and checkpoints."""
        return self.rank == 0

    @property
    def processes(self) -> int:
        """The number of processes, of which several may be one rank that reads rows."""
        return self.size

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

    def first_on_node(self, make: Callable[[], T]) -> T:
        """What each rank makes, after the first rank of its node has."""
        return make()

    def use_timeout(self, seconds: float) -> None:
        """End this process when the process of another rank does not answer for so long."""

    def use_run(self, path: Path) -> None:
        """Say how to continue the run at `path` when a rank is lost; `torchrun` continues it when it starts anew."""

    def check_launch(self, device: str, *, standard_input: bool) -> None:
        """Raises `UserError` for a device, or data from standard input, that these ranks cannot share."""

    def command(self) -> str:
        """The command line that starts `train.py` on these ranks."""
        return "python train.py"

    def unused_cores(self, device: torch.device) -> str:
        """How to use all cores, to follow the machine in a sentence."""
        return ""

    def ended(self, code: int) -> int:
        """`code`, with which all ranks end for good."""
        return code

    def main_first(self, make: Callable[[], T], open: Callable[[], T]) -> T:
        """What rank 0 makes, and the others `open` then; a `UserError` of rank 0 is raised on all ranks."""
        made: list[T] = []
        self.from_main(lambda: made.append(make()))
        return made[0] if self.is_main else open()

    def share(self, count: int, rank: int | None = None) -> range:
        """The part of `count` rows of `rank`, by default this one: all are adjacent and differ by one row at most."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All `count` rows, of which each rank has its share in `part`."""
        return part

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """What each rank sends to this one, one after the other: `sent[r]` numbers of `x` go to rank r."""
        return x


ONE_PROCESS = Ranks()


class ErrorOfMain(UserError):
    """An error of rank 0, raised on the other ranks."""

    reported = True

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.exit_code = getattr(error, "exit_code", StorageError.exit_code)


class Processes(Ranks):
    """Several processes, joined by `torch.distributed`: gloo for tensors on a CPU, NCCL on CUDA."""

    def __init__(self, watch: Watch, memory: Store) -> None:
        self.rank, self.size = watch.rank, len(watch.vigil.names)
        self._watch, self._memory = watch, memory
        self._command = launcher_command()  # the launcher may end before its ranks
        if memory.check([RUN]):
            self.begun = Path(memory.get(RUN).decode())

    def sum(self, x: Tensor) -> Tensor:
        from torch.distributed import all_reduce

        total = x.clone()
        all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        from torch.distributed import ReduceOp, all_reduce

        most = torch.tensor(number)  # on the CPU: a GPU need not be waited for
        all_reduce(most, ReduceOp.MAX)
        self._watch.steps += 1
        return int(most)

    def gather(self, part: Tensor, count: int) -> Tensor:
        shares = [len(self.share(count, rank)) for rank in range(self.size)]
        # Every rank has the same for all; gloo cannot gather parts of several sizes.
        sent = part.expand(self.size, *part.shape).flatten()
        row = part.shape[1:].numel()
        received = self.exchange(sent, [part.numel()] * self.size, [share * row for share in shares])
        return received.view(count, *part.shape[1:])

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        from torch.distributed import all_to_all_single

        result = x.new_empty(sum(received))
        all_to_all_single(result, x, list(received), list(sent))
        return result

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

    def first_on_node(self, make: Callable[[], T]) -> T:
        if number_from_launcher("LOCAL_RANK") == 0:
            made = make()
            self.all(None)
            return made
        self.all(None)
        return make()

    def use_timeout(self, seconds: float) -> None:
        self._watch.vigil.timeout = seconds

    def use_run(self, path: Path) -> None:
        self._watch.vigil.advice = f"to continue from the last checkpoint: {self.command()} --resume {path}"
        if self.is_main:
            self._memory.set(RUN, str(path))

    def check_launch(self, device: str, *, standard_input: bool) -> None:
        if standard_input and number_from_launcher("TORCHELASTIC_MAX_RESTARTS"):
            raise UserError("--data - can be read only once, and --max-restarts reads it again: name a file")
        if standard_input and number_from_launcher("GROUP_WORLD_SIZE") > 1:
            raise UserError("--data - is on one node only: name a file that every node has")
        if ":" in device:
            raise UserError(f"device {device!r} is a single one, and each rank has its own: give --device cuda")

    def command(self) -> str:
        return self._command

    def unused_cores(self, device: torch.device) -> str:
        threads = processors() // max(1, number_from_launcher("LOCAL_WORLD_SIZE"))
        unused = device.type == "cpu" and threads > torch.get_num_threads()
        return f"; OMP_NUM_THREADS={threads} would use all cores" if unused else ""

    def ended(self, code: int) -> int:
        if code:
            note_end(self._memory, code)
        return code


def check_gpus(ranks: Ranks, device: torch.device) -> None:
    """Raises `UserError` on a rank that has no GPU of its own."""
    here, gpus = number_from_launcher("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if ranks.size > 1 and device.type == "cuda" and here > gpus:
        raise UserError(f"{here} ranks share {gpus} GPUs: start one rank for each GPU, or give --device cpu")


@contextmanager
def joined_ranks(timeout: float = 60.0) -> Iterator[Ranks]:
    """The ranks that `torchrun` has started, joined; one process without it.

    A rank whose process does not answer for `timeout` seconds ends all others. An error in the block ends the process:
    one rank reports it, and the others end too.
    """
    if not is_launched():
        yield ONE_PROCESS
        return
    from torch import distributed

    memory = open_store()
    if (code := earlier_end(memory)) is not None:
        os._exit(code)
    rank, size = number_from_launcher("RANK"), int(os.environ["WORLD_SIZE"])
    attempt, names = meet(memory, rank, size)
    # A connection of its own: the watch must not wait for an operation of the main thread.
    of_watch = distributed.PrefixStore(f"{attempt}/watch", open_store())
    with Watch(of_watch, memory, rank, names, timeout) as watch:
        _join(distributed.PrefixStore(f"{attempt}/group", memory), rank, size)
        yield Processes(watch, memory)
        distributed.barrier()  # a rank that leaves early is taken for a lost one
    gc.collect()  # what still holds the group, in cycles, aborts the process at its exit
    distributed.destroy_process_group()


def _join(store: Store, rank: int, size: int) -> None:
    """Start the process group; its own timeout is that of the longest honest wait, for data that others prepare."""
    from torch import distributed

    # A lost rank is noticed, and named, by the watch.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(number_from_launcher("LOCAL_RANK") % torch.cuda.device_count())
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)


@contextmanager
def spoken_by_main() -> Iterator[None]:
    """Standard output and standard error are those of rank 0 alone; an error of another rank is reported once."""
    if number_from_launcher("RANK") == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
