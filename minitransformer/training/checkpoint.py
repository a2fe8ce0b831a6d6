"""Checkpoints: folders that are whole or absent, each with the SHA-256 of its files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import count_parameters
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


def load_model_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fill `model` with the weights of a checkpoint, which must hold exactly what the model has."""
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
    return torch.load(checkpoint / TRAINER, map_location="cpu", weights_only=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file has the checksum of the manifest."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, digest in manifest["sha256"].items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if files.sha256(checkpoint / name) != digest:
                return f"{name} does not have the checksum of its manifest"
    except (OSError, ValueError, KeyError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first, whole or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
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
        latest = folder / "latest"
        chosen = latest.resolve() if latest.exists() else candidates[-1].resolve()
    else:
        raise UserError(f"{folder.parent} has no whole checkpoint: train it first, or choose another run")
    fault = damage(chosen)
    if fault is None:
        return chosen
    others = [path.name for path in candidates if path.name != chosen.name and damage(path) is None]
    remedy = f"use --checkpoint {others[-1]} instead" if others else "there is no other one: train the run anew"
    raise UserError(f"checkpoint {chosen.name} of {folder.parent} is damaged ({fault}): {remedy}")


def remove_old_checkpoints(folder: Path, keep_last: int, *, also_before: int = 0) -> None:
    """Remove all checkpoints but the newest `keep_last`, the best and the latest, and what a kill left partial.

    The newest from before step `also_before` stays, too.
    """
    for partial in folder.glob("*.partial"):
        partial.unlink() if partial.is_symlink() else shutil.rmtree(partial)
    kept = {(folder / link).resolve().name for link in ("best", "latest") if (folder / link).exists()}
    kept |= {path.name for path in [p for p in checkpoints_in(folder) if checkpoint_step(p) < also_before][-1:]}
    for path in checkpoints_in(folder)[:-keep_last]:
        if path.name not in kept:
            shutil.rmtree(path)
