"""Tensors that are divided over ranks (`DTensor`), and the safetensors files that hold them without pickle.

`torch.distributed.checkpoint` writes each rank's part of a tensor, with its place in the whole, to files of that rank;
any number of ranks, or one process, reads what it needs of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from minitransformer.errors import StorageError

T = TypeVar("T", bound=Tensor)
WEIGHTS, OPTIMIZERS = 1, 2
"""numbers of a rank's files"""
SHARD_NAME = re.compile(r"shard-\d{5}-model-0000[12]-of-0000[12]\.safetensors")


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is divided over ranks, or replicated on them, as a `DTensor`."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this rank."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of `tensor`; all ranks call it alike."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole


def by_mesh(tensors: Sequence[T]) -> list[list[T]]:
    """`tensors` in groups that are divided over the same ranks, or not at all; at least one."""
    groups: dict[Any, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values()) or [[]]


def sharded_like(whole: Tensor, tensor: Any) -> Tensor:
    """`whole`, which every rank has, divided as `tensor` is; without communication."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(tensor.device)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def weight_files(checkpoint: Path) -> list[Path]:
    """The files with weights in a sharded checkpoint; empty for another one."""
    return sorted(
        path for path in checkpoint.glob(f"shard-*-model-{WEIGHTS:05d}-of-*") if SHARD_NAME.fullmatch(path.name)
    )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what reading damaged shards in `folder` raises into a `StorageError`."""
    try:
        yield
    except (
        *(OSError, MemoryError, SafetensorError),
        *(LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError),
    ) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{folder} has no complete shards ({reason}): choose another --checkpoint") from None


class Stored:
    """The tensors in all safetensors files of `folder`; raises `StorageError` if they are not complete."""

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        self.folder = folder
        with explained(folder):
            self._reader = HuggingFaceStorageReader(str(folder))
            self._metadata = self._reader.read_metadata()
            self._check_complete()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: about.size for name, about in self._about.items()}

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._about[name].properties.dtype
        return dtype

    @property
    def _about(self) -> dict[str, Any]:
        return self._metadata.state_dict_metadata

    def _check_complete(self) -> None:
        # A part that is missing would leave that of the model as it is.
        for name, about in self._about.items():
            if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
                raise ValueError(f"a part of {name} is missing")

    @torch.no_grad()
    def read(self, wanted: Mapping[str, Tensor]) -> None:
        """Fill the tensors `wanted`, or this rank's part of them, with those of the same names."""
        from torch.distributed.checkpoint import DefaultLoadPlanner

        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with explained(self.folder):
            planner.set_up_planner(dict(wanted), self._metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()


# --- the state of optimizers, in names of tensors


def without_tensors(states: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors in the states of optimizers by name, and the states without them."""
    tensors: dict[str, Tensor] = {}
    rest = []
    for number, optimizer in enumerate(states):
        other: dict[str, dict[str, Any]] = {}
        for parameter, state in optimizer["state"].items():
            other[parameter] = {kind: value for kind, value in state.items() if not isinstance(value, Tensor)}
            for kind, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizers.{number}.{kind}.{parameter}"] = value
        rest.append({**optimizer, "state": other})
    return tensors, rest


def is_of_optimizer(name: str) -> bool:
    return name.startswith("optimizers.")


def read_optimizers(stored: Stored, states: list[dict[str, Any]], parameters: Mapping[str, Tensor]) -> None:
    """Add the tensors that `without_tensors` took out of `states`, divided over ranks as `parameters` are."""
    wanted = {}
    for name, shape in stored.shapes.items():
        if not is_of_optimizer(name):
            continue
        with explained(stored.folder):
            _, number, kind, of = name.split(".", 3)
            parameter, state = parameters[of].detach(), states[int(number)]["state"]
            like = parameter if parameter.shape == shape else torch.empty(shape)
            wanted[name] = torch.empty_like(like, dtype=stored.dtype(name))
            state.setdefault(of, {})[kind] = wanted[name]
    stored.read(wanted)
