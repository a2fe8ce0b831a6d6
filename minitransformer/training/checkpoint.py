"""Checkpoints: folders written atomically, with the SHA-256 of each file."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer import files
from minitransformer.amounts import size
from minitransformer.errors import StorageError, UserError
from minitransformer.models.model import Model, build_in_parts, check_memory, count_trained, merged
from minitransformer.records import read_json
from minitransformer.settings import flat, settings_of
from minitransformer.training.config import RunConfig
from minitransformer.training.shards import SHARD_NAME, Stored, local_part, read_optimizers, weight_files
from minitransformer.training.weights import (
    BASE,
    MANIFEST,
    MODEL,
    Parent,
    check_weights,
    load_model_weights,
    stored_tensors,
)

TRAINER = "trainer.pt"
# In a run folder, which is locked by the process that writes to it.
CHECKPOINTS, LOCK = "checkpoints", "train.lock"
# The size of a checkpoint without its tensors.
MARGIN = 1_000_000


def check_room(path: Path, config: RunConfig) -> tuple[int, int]:
    """The bytes that the checkpoints of a run need, and those that are free on the disk of `path`.

    Raises `StorageError` if they are too few.
    """
    # Plus the best checkpoint and one being written.
    most = config.training.keep_last + 2 + config.training.on_spike.make().spare_checkpoints
    needed = 3 * 4 * count_trained(config.model) * most + 10_000_000  # weights and AdamW's two moments, in float32
    folder = files.existing(path)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"the checkpoints of this run need {size(needed)} and {folder} has {size(free)} free: "
            "free some, lower --keep-last, or choose an --out on another disk"
        )
    return needed, free


def check_room_for(folder: Path, name: str, size_of_tensors: int) -> None:
    """Raise a `StorageError` if the disk of `folder` cannot hold one more checkpoint, called `name`."""
    needed = size_of_tensors + MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        whole = [path.name for path in checkpoints_in(folder)]
        # Without one, as in an import, the folder may not be a run yet.
        go_on = f"and continue the run with --resume {folder.parent} ({whole[-1]} is the last one)" if whole else ""
        raise StorageError(
            f"checkpoint {name} needs {size(needed)} and {folder} has {size(free)} free: "
            f"free some, {go_on or 'or choose an --out on another disk'}"
        )


def size_of(state: Any) -> int:
    """The number of bytes of the tensors in `state`, or of their parts on this rank."""
    if isinstance(state, Tensor):
        return local_part(state).nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(size_of, parts))


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The number of training steps before `checkpoint`."""
    return int(checkpoint.name.removeprefix("step-"))


def write_checkpoint(
    folder: Path, step: int, model: nn.Module, trainer_state: dict[str, Any], config: RunConfig | None = None
) -> Path:
    """Write `folder`/step-NNNNNN with the weights of `model`, as `write_state` does."""
    return write_state(folder, step, stored_tensors(model), trainer_state, config, base=getattr(model, "base", None))


def write_state(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    trainer_state: dict[str, Any],
    config: RunConfig | None = None,
    *,
    go_on: Callable[[], None] = lambda: None,
    base: Parent | None = None,
) -> Path:
    """Write `folder`/step-NNNNNN and point `latest` to it; `config` is the configuration of the run.

    `base` is the checkpoint that holds the weights which an adapter leaves as they are.
    What `go_on` raises between two files ends it. Raises `StorageError` if the disk is too full, and `OSError` if it
    cannot be written.
    """
    path = folder / checkpoint_name(step)
    check_room_for(folder, path.name, size_of((tensors, trainer_state)))
    with files.whole_folder(path) as temporary:
        files.write_tensors(temporary / MODEL, tensors)
        go_on()
        write_trainer_state(trainer_state, temporary / TRAINER)
        digests = {}
        for name in (MODEL, TRAINER):
            go_on()
            digests[name] = files.sha256(temporary / name)
        write_manifest(temporary, step, config, digests, base)
        go_on()
    files.point_to(folder / "latest", path.name)
    return path


def write_manifest(
    folder: Path,
    step: int,
    config: RunConfig | None,
    digests: Mapping[str, str],
    base: Parent | None = None,
    **about: Any,
) -> None:
    """Write the manifest of a checkpoint in `folder`: its step, its configuration, its base, and all checksums."""
    manifest = {"step": step, **about}
    if base is not None:
        manifest[BASE] = base.to_json()
    if config is not None:
        manifest["config"] = config.to_json()
    manifest["sha256"] = dict(digests)
    (folder / MANIFEST).write_text(json.dumps(files.sealed(manifest), indent=2) + "\n")


def write_trainer_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch reports a file position; the cause is the OSError before it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_model(
    checkpoint: Path, config: RunConfig, device: torch.device | str = "cpu", base: Path | None = None
) -> Model:
    """The model of `config` in eval mode, with the weights of `checkpoint`, into which an adapter is merged.

    `base` is where the checkpoint of an adapter's base is now. Raises `StorageError` for a checkpoint of another run.
    """
    return merged(load_unmerged(checkpoint, config, base)).to(device).eval()


def load_unmerged(checkpoint: Path, config: RunConfig, base: Path | None = None) -> Model:
    """`load_model`, with an adapter beside the weights of its base."""
    check_same_settings(checkpoint, config)
    check_weights(checkpoint, config.model, base)
    check_memory(config.model, str(checkpoint))
    model = build_in_parts(config.model)
    load_model_weights(checkpoint, model, base)
    return model


def load_learner_state(checkpoint: Path, model: nn.Module) -> dict[str, Any]:
    """The trainer's state in a checkpoint, with the optimizer states of the parameters of `model`."""
    state = load_trainer_state(checkpoint)
    if state and weight_files(checkpoint):
        read_optimizers(Stored(checkpoint), state["optimizers"], dict(model.named_parameters()))
    return state


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint, without tensors in shards; loading executes no code."""
    path = checkpoint / TRAINER
    try:
        _check_records(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message says how to execute it
        raise StorageError(
            f"{path} holds more than tensors, numbers and texts, and could execute code: choose another --checkpoint"
        ) from None
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{path} cannot be read ({reason}): choose another --checkpoint") from None
    # Initial weights have no trainer state yet.
    if not isinstance(state, dict) or (state and not state.keys() >= {"optimizers", "precision", "progress"}):
        raise StorageError(f"{path} holds no trainer state: choose another --checkpoint")
    return state


def _check_records(path: Path) -> None:
    """Raise `ValueError` if reading the records in `path`, a file of `torch.save`, takes more memory than it has bytes.

    Torch does not compress them, and would decompress some megabytes to any size.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError("its records are compressed, as torch does not write them")


def load_progress(checkpoint: Path) -> dict[str, Any]:
    """The training progress in a checkpoint; empty for initial weights."""
    return load_trainer_state(checkpoint).get("progress", {})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if the manifest and every checksum match.

    Raises `StorageError` for a file without read permission.
    """
    present = {path.name for path in checkpoint.iterdir() if path.is_file()} if checkpoint.is_dir() else set()
    for name in sorted(present):
        if not os.access(checkpoint / name, os.R_OK):
            raise StorageError(f"{checkpoint / name} cannot be read: ask its owner for permission")
    try:
        manifest = files.unsealed(read_json(checkpoint / MANIFEST, "choose another --checkpoint"))
        digests, step, ranks = dict(manifest["sha256"]), manifest["step"], manifest.get("ranks")
    except (ValueError, KeyError, TypeError, AttributeError, UserError):
        return f"{MANIFEST} is missing or damaged"
    if step != checkpoint_step(checkpoint):
        return f"{MANIFEST} belongs to step {step}"
    shards = [name for name in digests if SHARD_NAME.fullmatch(name)]
    names = [MODEL, TRAINER] if ranks is None or not shards else [*shards, TRAINER]
    for name in names:
        if name not in digests:
            return f"{MANIFEST} has no checksum of {name}"
        if name not in present:
            return f"{name} is missing"
        if files.sha256(checkpoint / name) != digests[name]:
            return f"{name} does not have the checksum of its manifest"
    # All of these are read.
    if others := sorted(name for name in present - set(names) if name.endswith(".safetensors")):
        return f"{MANIFEST} does not know {others[0]}"
    return None


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that cannot change on resume.

    These are the settings of the model and the data, and those of training that are marked so; a variant's setting is
    treated as its part of the configuration.
    """
    fixed: dict[str, Any] = {}
    for part, may_change in ((config.model, False), (config.data, False), (config.training, True)):
        about = {each.name: each.about.get("may_change_on_resume", may_change) for each, _ in settings_of(part)}
        fixed |= {name: value for name, value in flat(part).items() if not about[name]}
    return fixed


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
        chosen = _resolved(folder / name)
        if chosen not in [path.resolve() for path in candidates]:
            known = ", ".join(path.name for path in candidates) or "none"
            raise UserError(f"{folder.parent} has no checkpoint {name!r}: choose from {known}")
    elif candidates:
        latest = _resolved(folder / "latest")
        chosen = latest if latest in [path.resolve() for path in candidates] else candidates[-1].resolve()
    else:
        raise UserError(f"{folder.parent} has no complete checkpoint: train it first, or choose another run")
    fault = damage(chosen)
    if fault is None:
        return chosen
    others = [path.name for path in candidates if path.name != chosen.name and damage(path) is None]
    remedy = f"use --checkpoint {others[-1]} instead" if others else "there is no other one: train the run again"
    raise StorageError(f"checkpoint {chosen.name} of {folder.parent} is damaged ({fault}): {remedy}")


def _resolved(path: Path) -> Path:
    """`path` without links; itself if it is a circle of links, or no name of a file."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path


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
