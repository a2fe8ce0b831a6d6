"""Checkpoints: folders that are whole or absent, each with the SHA-256 of its files."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import check_size, count_parameters
from minitransformer.records import read_json
from minitransformer.training.config import RunConfig

MODEL, TRAINER, MANIFEST = "model.safetensors", "trainer.pt", "manifest.json"


def check_room(path: Path, config: RunConfig) -> None:
    """Raise a `UserError` if the disk of `path` cannot hold the checkpoints of a run."""
    # Weights and AdamW's two moments, in float32; the best one and one being written stand beside the last ones.
    size = 3 * 4 * count_parameters(config.model)
    needed = size * (config.training.keep_last + 2) + 10_000_000
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the checkpoints of this run need {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: "
            "free some, lower --keep-last, or choose an --out on another disk"
        )


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoint_step(checkpoint: Path) -> int:
    """How many steps were done when `checkpoint` was written."""
    return int(checkpoint.name.removeprefix("step-"))


def write_checkpoint(folder: Path, step: int, model: nn.Module, trainer_state: dict[str, Any]) -> Path:
    """Write `folder`/step-NNNNNN and point `latest` to it."""
    path = folder / checkpoint_name(step)
    with files.whole_folder(path) as temporary:
        save_file(unique_tensors(model), temporary / MODEL)
        torch.save(trainer_state, temporary / TRAINER)
        manifest = {"step": step, "sha256": {name: files.sha256(temporary / name) for name in (MODEL, TRAINER)}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    files.point_to(folder / "latest", path.name)
    return path


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and stored buffers of `model`, tied ones under their first name only."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def check_weights(checkpoint: Path, config: ModelConfig) -> None:
    """Raise a `UserError` if the weights of `checkpoint` are far fewer than a model of `config` has."""
    path = checkpoint / MODEL
    with _safetensors(path), safe_open(path, "pt") as stored:
        count = len(stored.keys())
    check_size(config, count, path.stat().st_size, str(path))


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): choose another --checkpoint") from None


def load_model_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fill `model` with the weights of a checkpoint, which must hold exactly what the model has."""
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


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's part of a checkpoint; no code in it is run."""
    try:
        state = torch.load(checkpoint / TRAINER, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{checkpoint / TRAINER} cannot be read ({reason}): choose another --checkpoint") from None
    # A model that was imported has none yet.
    if not isinstance(state, dict) or (state and not state.keys() >= {"optimizers", "precision", "progress"}):
        raise UserError(f"{checkpoint / TRAINER} holds no state of a trainer: choose another --checkpoint")
    return state


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file has the checksum of the manifest."""
    try:
        manifest = read_json(checkpoint / MANIFEST, "choose another --checkpoint")
        for name, digest in manifest["sha256"].items():
            if Path(name).name != name:
                return f"{MANIFEST} names {name!r}, which is no file of a checkpoint"
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if files.sha256(checkpoint / name) != digest:
                return f"{name} does not have the checksum of its manifest"
    except (OSError, ValueError, KeyError, AttributeError, UserError):
        return f"{MANIFEST} is missing or damaged"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first, whole or not; a link to a folder elsewhere is none."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,18}", path.name, re.ASCII)]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=checkpoint_step)


def choose_checkpoint(folder: Path, name: str | None = None) -> Path:
    """The whole checkpoint called `name`, by default the latest; if it is damaged, the `UserError` offers another."""
    candidates = checkpoints_in(folder)
    if name is not None:
        chosen = (folder / name).resolve()
        if chosen not in [path.resolve() for path in candidates]:
            known = ", ".join(path.name for path in candidates) or "none"
            raise UserError(f"{folder.parent} has no checkpoint {name!r}: there is {known}")
    elif candidates:
        latest = (folder / "latest").resolve()
        chosen = latest if latest in [path.resolve() for path in candidates] else candidates[-1].resolve()
    else:
        raise UserError(f"{folder.parent} has no whole checkpoint: train it first, or choose another run")
    fault = damage(chosen)
    if fault is None:
        return chosen
    others = [path.name for path in candidates if path.name != chosen.name and damage(path) is None]
    remedy = f"use --checkpoint {others[-1]} instead" if others else "there is no other one: train the run anew"
    raise UserError(f"checkpoint {chosen.name} of {folder.parent} is damaged ({fault}): {remedy}")


def remove_old_checkpoints(folder: Path, keep_last: int) -> None:
    """Remove all checkpoints but the newest `keep_last`, the best and the latest, and what a kill left partial."""
    for partial in folder.glob("*.partial"):
        partial.unlink() if partial.is_symlink() else shutil.rmtree(partial)
    kept = {(folder / link).resolve().name for link in ("best", "latest") if (folder / link).exists()}
    for path in checkpoints_in(folder)[:-keep_last]:
        if path.name not in kept:
            shutil.rmtree(path)
