"""Checkpoints of models that are divided over ranks: each rank writes its part, and rank 0 seals the folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.training.checkpoint import (
    TRAINER,
    check_room_for,
    checkpoint_name,
    size_of,
    write_manifest,
    write_trainer_state,
)
from minitransformer.training.config import RunConfig
from minitransformer.training.shards import OPTIMIZERS, WEIGHTS, without_tensors
from minitransformer.training.weights import Parent

T = TypeVar("T")


class ShardWriter:
    """Writes checkpoints together with all other ranks, which must call the same in the same order.

    A checkpoint is whole or absent: its folder is named once all ranks have written and synced their files. An error
    on one rank is raised on all of them.
    """

    def __init__(self) -> None:
        from torch import distributed

        # Of its own: a thread writes checkpoints while training communicates.
        self.group = distributed.new_group(backend="gloo")
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def write_state(
        self,
        folder: Path,
        step: int,
        tensors: dict[str, Tensor],
        trainer_state: dict[str, Any],
        config: RunConfig | None = None,
        *,
        go_on: Callable[[], None] = lambda: None,
        base: Parent | None = None,
    ) -> Path:
        """Write `folder`/step-NNNNNN as `checkpoint.write_state` does; the state of the trainer is that of rank 0."""
        path = folder / checkpoint_name(step)
        moments, rest = without_tensors(trainer_state.get("optimizers", []))
        trainer_state = {**trainer_state, "optimizers": rest} if trainer_state else {}
        sizes = self._together(lambda: size_of((tensors, moments, trainer_state)))
        with ExitStack() as whole:  # on rank 0, the folder is named when it closes

            def begin() -> Path:
                check_room_for(folder, path.name, sum(sizes))
                return whole.enter_context(files.whole_folder(path))

            def seal() -> None:
                names = {name: digest for part in digests for name, digest in part.items()}
                if lost := sorted(name for name in names if not (temporary / name).is_file()):
                    raise StorageError(f"rank 0 does not see {lost[0]}: give an --out on a disk that all nodes share")
                write_trainer_state(trainer_state, temporary / TRAINER)
                names[TRAINER] = files.sha256(temporary / TRAINER)
                write_manifest(temporary, step, config, names, base, ranks=self.size)
                go_on()
                whole.close()
                files.point_to(folder / "latest", path.name)

            temporary = self._on_main(begin)
            self._together(lambda: self._write_shards(temporary, tensors, moments))
            digests = self._together(lambda: self._digests(temporary, go_on))
            self._on_main(seal)
        return path

    def _write_shards(self, folder: Path, tensors: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        from torch.distributed import checkpoint as dcp

        places = {**dict.fromkeys(tensors, WEIGHTS), **dict.fromkeys(moments, OPTIMIZERS)}
        try:
            dcp.save(
                {**tensors, **moments},
                storage_writer=dcp.HuggingFaceStorageWriter(str(folder), places, save_distributed=True),
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self.group,
            )
        except dcp.CheckpointException as error:  # of any rank
            raise next(iter(error.failures.values()))[0] from None

    def _digests(self, folder: Path, go_on: Callable[[], None]) -> dict[str, str]:
        """The checksums of this rank's files."""
        digests = {}
        for path in folder.glob(f"shard-{self.rank + 1:05d}-*"):
            go_on()
            digests[path.name] = files.sha256(path)
        return digests

    def _on_main(self, do: Callable[[], T]) -> T:
        """What `do` returns on rank 0."""
        return self._together(lambda: do() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _together(self, do: Callable[[], T]) -> list[T]:
        """What `do` returns on each rank; an error on one of them is raised on all."""
        from torch import distributed

        done: T | None = None
        error: Exception | None = None
        try:
            done = do()
        except Exception as raised:
            error = raised
        known = error is None or isinstance(error, OSError | UserError)
        mine = done, error if known else RuntimeError(f"{type(error).__name__}: {error}")
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, mine, group=self.group)
        if errors := [other for _, other in everyone if other is not None]:
            raise error or errors[0]
        return [result for result, _ in everyone]
