"""Checkpoints: folders written atomically, with the SHA-256 of each file."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minitransformer import files
from minitransformer.amounts import size
from minitransformer.errors import StorageError, UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model, check_size, count_parameters
from minitransformer.records import read_json
from minitransformer.training.config import RunConfig, fixed_settings

MODEL, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"
# In a run folder, which is locked by the process that writes to it.
CHECKPOINTS, LOCK = "checkpoints", "train.lock"
# The size of a checkpoint without its tensors.
MARGIN = 1_000_000


def check_room(path: Path, config: RunConfig) -> None:
    """Raise a `StorageError` if the disk of `path` cannot hold the checkpoints of a run."""
    # Plus the best checkpoint and one being written.
    most = config.training.keep_last + 2 + config.training.on_spike.make().spare_checkpoints
    needed = 3 * 4 * count_parameters(config.model) * most + 10_000_000  # weights and AdamW's two moments, in float32
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"the checkpoints of this run need {size(needed)} and {folder} has {size(free)} free: "
            "free some, lower --keep-last, or choose an --out on another disk"
        )


def _check_room_for(folder: Path, name: str, tensors: Mapping[str, Tensor], trainer_state: dict[str, Any]) -> None:
    """Raise a `StorageError` if the disk of `folder` cannot hold one more checkpoint."""
    needed = sum(tensor.nbytes for tensor in (*tensors.values(), *_tensors_in(trainer_state))) + MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        whole = [path.name for path in checkpoints_in(folder)]
        # Without one, as in an import, the folder may not be a run yet.
        go_on = f"and continue the run with --resume {folder.parent} ({whole[-1]} is the last one)" if whole else ""
        raise StorageError(
            f"checkpoint {name} needs {size(needed)} and {folder} has {size(free)} free: "
            f"free some, {go_on or 'or choose an --out on another disk'}"
        )


def _tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors_in(part)


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The number of training steps before `checkpoint`."""
    return int(checkpoint.name.removeprefix("step-"))


def write_checkpoint(
    folder: Path, step: int, model: nn.Module, trainer_state: dict[str, Any], config: RunConfig | None = None
) -> Path:
    """Write `folder`/step-NNNNNN and point `latest` to it; `config` is the configuration of the run.

    Raises `StorageError` if the disk is too full, and `OSError` if it cannot be written.
    """
    path, tensors = folder / checkpoint_name(step), unique_tensors(model)
    _check_room_for(folder, path.name, tensors, trainer_state)
    with files.whole_folder(path) as temporary:
        files.write_tensors(temporary / MODEL, tensors)
        _write_state(trainer_state, temporary / TRAINER)
        manifest: dict[str, Any] = {"step": step}
        if config is not None:
            manifest["config"] = config.to_json()
        manifest["sha256"] = {name: files.sha256(temporary / name) for name in (MODEL, TRAINER)}
        (temporary / MANIFEST).write_text(json.dumps(files.sealed(manifest), indent=2) + "\n")
    files.point_to(folder / "latest", path.name)
    return path


def _write_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch reports a file position; the cause is the OSError before it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of `model`; tied ones under their first name only."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def check_weights(checkpoint: Path, config: ModelConfig) -> None:
    """Raise a `UserError` if `checkpoint` is far too small for a model of `config`."""
    path = checkpoint / MODEL
    with _safetensors(path), safe_open(path, "pt") as stored:
        count = len(stored.keys())
    check_size(config, count, path.stat().st_size, str(path))


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} is not a complete safetensors file ({error}): choose another --checkpoint"
        ) from None


def load_model_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into `model`; names and shapes must match exactly."""
    with _safetensors(checkpoint / MODEL):
        stored = load_file(checkpoint / MODEL)
    wanted = unique_tensors(model)
    faults = [f"missing {name}" for name in wanted.keys() - stored.keys()]
    faults += [f"unknown {name}" for name in stored.keys() - wanted.keys()]
    faults += [
        f"{name} is {list(stored[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name].shape
    ]
    if faults:
        raise UserError(f"{checkpoint} does not fit the model of its run: {', '.join(sorted(faults))}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def load_model(checkpoint: Path, config: RunConfig, device: torch.device | str = "cpu") -> Model:
    """The model of `config` in eval mode, with the weights of `checkpoint`.

    Raises `StorageError` for a checkpoint of another run.
    """
    check_same_settings(checkpoint, config)
    check_weights(checkpoint, config.model)
    model = build_model(config.model)
    load_model_weights(checkpoint, model)
    return model.to(device).eval()


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint; loading executes no code."""
    try:
        state = torch.load(checkpoint / TRAINER, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{checkpoint / TRAINER} cannot be read ({reason}): choose another --checkpoint") from None
    # Initial weights have no trainer state yet.
    if not isinstance(state, dict) or (state and not state.keys() >= {"optimizers", "precision", "progress"}):
        raise StorageError(f"{checkpoint / TRAINER} holds no trainer state: choose another --checkpoint")
    return state


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """The training progress in a checkpoint; empty for initial weights."""
    return load_trainer_state(checkpoint).get("progress", {})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if the manifest and every checksum match.

    Raises `StorageError` for a file without read permission.
    """
    for path in (checkpoint / name for name in (MANIFEST, MODEL, TRAINER)):
        if path.exists() and not os.access(path, os.R_OK):
            raise StorageError(f"{path} cannot be read: ask its owner for permission")
    try:
        manifest = files.unsealed(read_json(checkpoint / MANIFEST, "choose another --checkpoint"))
        digests, step = dict(manifest["sha256"]), manifest["step"]
    except (ValueError, KeyError, TypeError, UserError):
        return f"{MANIFEST} is missing or damaged"
    if step != checkpoint_step(checkpoint):
        return f"{MANIFEST} belongs to step {step}"
    for name in (MODEL, TRAINER):
        if name not in digests:
            return f"{MANIFEST} has no checksum of {name}"
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if files.sha256(checkpoint / name) != digests[name]:
            return f"{name} does not have the checksum of its manifest"
    return None


def check_same_settings(checkpoint: Path, config: RunConfig) -> None:
    """Raise a `StorageError` if `checkpoint` was trained with other settings than `config`.

    Settings that may change on resume are not compared; old checkpoints do not record theirs.
    """
    manifest = checkpoint / MANIFEST
    record = read_json(manifest, "choose another --checkpoint")
    if "config" not in record:
        return
    now, then = fixed_settings(config), fixed_settings(RunConfig.from_json(record["config"], str(manifest)))
    for name, value in then.items():
        if value != now[name]:
            raise StorageError(
                f"{checkpoint.name} of {checkpoint.parent.parent} was trained with {name} {value}, and the run's "
                f"config.json says {now[name]}: restore config.json"
            )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by step, complete or not; links to other folders are left out."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,18}", path.name, re.ASCII)]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=checkpoint_step)


def choose_checkpoint(folder: Path, name: str | None = None) -> Path:
    """The checkpoint `name`, by default the latest; raises `StorageError` with an alternative if it is damaged."""
    _restore(folder)
    candidates = checkpoints_in(folder)
    if name is not None:
        chosen = (folder / name).resolve()
        if chosen not in [path.resolve() for path in candidates]:
            known = ", ".join(path.name for path in candidates) or "none"
            raise UserError(f"{folder.parent} has no checkpoint {name!r}: choose from {known}")
    elif candidates:
        latest = (folder / "latest").resolve()
        chosen = latest if latest in [path.resolve() for path in candidates] else candidates[-1].resolve()
    else:
        raise UserError(f"{folder.parent} has no complete checkpoint: train it first, or choose another run")
    fault = damage(chosen)
    if fault is None:
        return chosen
    others = [path.name for path in candidates if path.name != chosen.name and damage(path) is None]
    remedy = f"use --checkpoint {others[-1]} instead" if others else "there is no other one: train the run again"
    raise StorageError(f"checkpoint {chosen.name} of {folder.parent} is damaged ({fault}): {remedy}")


def _restore(folder: Path) -> None:
    """Restore a checkpoint that was being replaced at a kill, unless the run is being trained now."""
    if not any(folder.glob(f"*{files.REPLACED}")):
        return
    with suppress(OSError):  # such as a read-only disk
        lock = files.acquired(folder.parent / LOCK, wait=False)
        if lock is not None:
            try:
                files.restore_replaced(folder)
            finally:
                lock.release()


def remove_old_checkpoints(folder: Path, keep_last: int, *, also_before: Iterable[int] = ()) -> None:
    """Remove all checkpoints except the newest `keep_last`, the best and the latest.

    The newest one before each step of `also_before` is kept too.
    """
    kept = {(folder / link).resolve().name for link in ("best", "latest") if (folder / link).exists()}
    found = checkpoints_in(folder)
    for step in also_before:
        kept |= {path.name for path in [path for path in found if checkpoint_step(path) < step][-1:]}
    for path in found[:-keep_last]:
        if path.name not in kept:
            shutil.rmtree(path)
