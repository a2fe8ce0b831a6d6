"""The weights in a checkpoint, read into a model; those of an adapter are composed with the weights of its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_in_parts, check_memory, check_size, merged
from minitransformer.models.stored import StoredLinear
from minitransformer.records import read_json, whole_record
from minitransformer.training.config import RunConfig
from minitransformer.training.shards import (
    Stored,
    is_of_optimizer,
    is_sharded,
    local_part,
    sharded_like,
    weight_files,
)

MODEL, MANIFEST = "model.safetensors", "manifest.json"
BASE = "base"
"""key of an adapter's base in a manifest"""


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a run started from, and the base of an adapter that it trains."""

    path: str
    checkpoint: str
    sha256: str
    """SHA-256 of the weights file"""

    @classmethod
    def of(cls, run: Path, checkpoint: Path) -> Parent:
        """The parent for `checkpoint` of the run folder `run`."""
        return cls(str(run), checkpoint.name, weights_digest(checkpoint))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any, origin: str) -> Parent | None:
        """The parent in `record`, from the file `origin`; None for a run from scratch. Raises `StorageError`."""
        return None if record is None else whole_record(cls, record, "its parent", origin)

    def found(self, adapter: Path, now: Path | None = None) -> Path:
        """The checkpoint of this base of the checkpoint `adapter`, where it was, beside its run, or at `now`.

        Raises `UserError` if it is not there, or is another one.
        """
        run = adapter.parent.parent
        places = [Path(self.path), run.absolute().parent / Path(self.path).name]
        candidates = [place / adapter.parent.name / self.checkpoint for place in places] if now is None else [now]
        found = next((path for path in candidates if path.is_dir()), None)
        if found is None:
            raise UserError(
                f"the base of the adapter {run} is not there ({candidates[0]}): put it back, or merge the adapter first"
            )
        if (digest := weights_digest(found)) != self.sha256:
            raise UserError(
                f"the adapter {run} belongs to another base than {found}, whose weights have the SHA-256 "
                f"{digest[:12]}…, not {self.sha256[:12]}…: give the base that it was trained on"
            )
        return found


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of `model`; tied ones under their first name only."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds: its `unique_tensors`, without those of a base, which an adapter freezes."""
    left_out = set() if getattr(model, "base", None) is None else _frozen(model)
    return {name: tensor for name, tensor in unique_tensors(model).items() if name not in left_out}


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def weights_digest(checkpoint: Path) -> str:
    """The SHA-256 of the file with the weights; of the checksums of all of them in a sharded checkpoint."""
    shards = weight_files(checkpoint)
    if not shards:
        return files.sha256(checkpoint / MODEL)
    return hashlib.sha256("".join(map(files.sha256, shards)).encode()).hexdigest()


def check_weights(checkpoint: Path, config: ModelConfig, base: Path | None = None) -> None:
    """Raise a `UserError` if `checkpoint` is far too small for a model of `config`.

    Of an adapter, its base is checked, which is at `base` if given.
    """
    if (parent := base_of(checkpoint)) is not None:
        check_weights(parent.found(checkpoint, base), config.base)
        return
    names: set[str] = set()
    size = 0
    for path in weight_files(checkpoint) or [checkpoint / MODEL]:
        with _safetensors(path), safe_open(path, "pt") as stored:
            names.update(stored.keys())
            size += path.stat().st_size
    check_size(config, len(names), size, str(checkpoint / MODEL if path.name == MODEL else checkpoint))


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError, SafetensorError) as error:
        raise StorageError(
            f"{path} is not a complete safetensors file ({error}): choose another --checkpoint"
        ) from None


def base_of(checkpoint: Path) -> Parent | None:
    """The base of an adapter's checkpoint; None for one that holds all weights."""
    path = checkpoint / MANIFEST
    if not path.exists():
        return None
    return Parent.from_json(read_json(path, "choose another --checkpoint").get(BASE), str(path))


def load_model_weights(checkpoint: Path, model: Model, base: Path | None = None) -> None:
    """Load the weights of a checkpoint into `model`; names and shapes must match exactly.

    Those that an adapter leaves as they are come from its base, which is at `base` if given. Either of checkpoint and
    model, or both, may be divided over ranks.
    """
    model.base = parent = base_of(checkpoint)
    if parent is not None:
        load_base(parent.found(checkpoint, base), model)
    wanted = stored_tensors(model)
    shapes, read = _opened(checkpoint, wanted)
    _check_fits(checkpoint, shapes, wanted)
    read(wanted)


def load_base(checkpoint: Path, model: Model) -> None:
    """Load those weights into `model`, which has an adapter, that the base in `checkpoint` has.

    Those which the adapter stores in 8 bits are never all in memory as they are in the file.
    """
    every, frozen = unique_tensors(model), _frozen(model)
    if base_of(checkpoint) is None:
        shapes, read = _opened(checkpoint, every)
    else:
        whole = unique_tensors(_merged_model(checkpoint))
        shapes, read = {name: tensor.shape for name, tensor in whole.items()}, partial(_copy, whole)
    stored = {name: part for name, part in model.named_modules() if isinstance(part, StoredLinear)}
    rounded = {name: part for name, part in stored.items() if f"{name}.scale" not in shapes}
    wanted = {name: tensor for name, tensor in every.items() if name.removesuffix(".scale") not in rounded}
    held = {name: tensor for name, tensor in wanted.items() if shapes.get(name) == tensor.shape or name in frozen}
    _check_fits(checkpoint, {name: shape for name, shape in shapes.items() if name in held}, held)
    matrices = {f"{name}.weight": part for name, part in rounded.items()}
    read({name: tensor for name, tensor in held.items() if name not in matrices})
    for name, part in matrices.items():
        full = torch.empty_like(held[name], dtype=part.scale.dtype)
        read({name: full})
        _round_into(part, full)


@torch.no_grad()
def _round_into(part: StoredLinear, weight: Tensor) -> None:
    """Set `part`, or the rows of it on this rank, to `weight` in fewer bits."""
    for ours, value in zip((part.weight, part.scale), part.quantise(local_part(weight)), strict=True):
        local_part(ours).copy_(value)


def _merged_model(checkpoint: Path) -> Model:
    """The model of an adapter's checkpoint, into which the adapter is merged."""
    path = checkpoint / MANIFEST
    config = RunConfig.from_json(read_json(path, "restore the base").get("config", {}), str(path))
    check_memory(config.model, str(checkpoint))
    with torch.random.fork_rng(devices=()):
        model = build_in_parts(config.model)
    load_model_weights(checkpoint, model)
    return merged(model)


Read = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors with those of the same names in a checkpoint"""


def _opened(checkpoint: Path, wanted: Mapping[str, Tensor]) -> tuple[Mapping[str, torch.Size], Read]:
    """The names and shapes of the weights in a checkpoint, and what reads those that are `wanted`."""
    if weight_files(checkpoint) or any(map(is_sharded, wanted.values())):
        stored = Stored(checkpoint)
        return {name: shape for name, shape in stored.shapes.items() if not is_of_optimizer(name)}, stored.read
    path = checkpoint / MODEL

    def read(wanted: Mapping[str, Tensor]) -> None:
        for name, tensor in wanted.items():  # a file that stays open keeps in memory what was read
            with _safetensors(path), safe_open(path, "pt") as stored:
                _copy({name: stored.get_tensor(name)}, {name: tensor})

    with _safetensors(path), safe_open(path, "pt") as stored:
        return {name: torch.Size(stored.get_slice(name).get_shape()) for name in sorted(stored.keys())}, read


@torch.no_grad()
def _copy(whole: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        tensor.copy_(sharded_like(whole[name], tensor) if is_sharded(tensor) else whole[name])


def _check_fits(checkpoint: Path, shapes: Mapping[str, torch.Size], wanted: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` unless `shapes`, those of the weights in `checkpoint`, are `wanted`."""
    faults = [f"missing {name}" for name in wanted.keys() - shapes.keys()]
    faults += [f"unknown {name}" for name in shapes.keys() - wanted.keys()]
    faults += [
        f"{name} is {list(shapes[name])} instead of {list(wanted[name].shape)}"
        for name in wanted.keys() & shapes.keys()
        if shapes[name] != wanted[name].shape
    ]
    if faults:
        raise UserError(f"{checkpoint} does not fit the model of its run: {', '.join(sorted(faults))}")
