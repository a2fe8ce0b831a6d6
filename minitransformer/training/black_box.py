"""The black box of a run that has diverged: all that its last step depends on, in a folder of its own.

It holds safetensors and JSON files, with their SHA-256 in `box.json`: opening it executes no code.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.plugins import check_plugins, plugins_of
from minitransformer.records import read_json, shown, whole_record
from minitransformer.text.batches import IGNORE, TrainingBatch
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.config import RunConfig
from minitransformer.training.learner import Learner
from minitransformer.training.machine import Resolved
from minitransformer.training.memory import OutOfMemory
from minitransformer.training.norms import Norms, json_number
from minitransformer.training.progress import StepFigures
from minitransformer.training.shards import whole_tensor
from minitransformer.training.weights import MODEL, unique_tensors

BLACK_BOX = "black-box"
RECORD, STATE, BATCHES, TEXT = "box.json", "state.safetensors", "batches.safetensors", "text.txt"
TOKENIZERS = "tokenizer.json", "target-tokenizer.json"
FILES = {MODEL, STATE, BATCHES, TEXT, *TOKENIZERS}
FORMAT = 1


def leave_black_box(folder: Path, learner: Learner, skipped: StepFigures | None) -> str:
    """Write the black box of the run in `folder`, and say in words where it is, or why there is none.

    Its step is the last one, whose figures are `skipped`, or the next one if none was skipped. This changes the state
    of `learner`, whose run is at its end.
    """
    if skipped is not None:
        learner.steps_done -= 1  # its weights are those before the step
        learner.precision.set_loss_scale(skipped.loss_scale)
    batches = learner.loader.training_batches(learner.steps_done + learner.skipped_batches)
    tensors: dict[str, Tensor] = {}
    record = {
        **_description(learner),
        "step": learner.steps_done + 1,
        "loss": None if skipped is None else json_number(skipped.loss),
        "grad_norm": None if skipped is None else json_number(skipped.grad_norm),
        "state": packed(learner.state_dict(), "state", tensors),
    }
    weights = {name: _copied(tensor) for name, tensor in unique_tensors(learner.model).items()}
    learner.probe = norms = Norms(learner.model)
    try:
        with norms.recorded():
            learner.step(batches)
    except OutOfMemory as error:
        return f"there is no black box ({error})"
    record["norms"] = norms.to_json(learner.ranks)

    def write(partial: Path) -> None:
        files.write_tensors(partial / MODEL, weights)
        files.write_tensors(partial / STATE, tensors)
        _write_batches(partial, batches, learner)

    return learner.ranks.from_main(lambda: _written(folder / BLACK_BOX, record, write))


def _written(path: Path, record: dict[str, Any], write: Callable[[Path], object]) -> str:
    """Write the black box `path` with `record` and the files that `write` adds; returns where it is, in words."""
    try:
        with files.whole_folder(path) as partial:
            write(partial)
            record["sha256"] = {file.name: files.sha256(file) for file in sorted(partial.iterdir())}
            (partial / RECORD).write_text(json.dumps(files.sealed(record), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        return f"its black box {path} could not be written ({error.strerror})"
    return f"`python -m minitransformer replay {path}` shows where"


def _description(learner: Learner) -> dict[str, Any]:
    """What a replay needs beside tensors."""
    ranks = learner.ranks.size
    return {
        "format": FORMAT,
        "seed": learner.config.training.seed,
        "config": learner.config.to_json(),
        "plugins": [vars(plugin) for plugin in plugins_of(learner.config)],
        "machine": learner.machine.resolved.to_json(),
        "machine_in_words": f"{f'{ranks} ranks, each ' if ranks > 1 else ''}{learner.machine.description}",
        "versions": {
            **{name: version(name) for name in ("minitransformer", "torch", "numpy")},
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    }


def _copied(tensor: Tensor) -> Tensor:
    """All of `tensor`, on the CPU."""
    return whole_tensor(tensor.detach()).to("cpu", copy=True).contiguous()


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; tensors in it are copied to `tensors`, under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = _copied(value)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"entries": [[key, packed(part, f"{name}.{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [packed(part, f"{name}.{index}", tensors) for index, part in enumerate(value)]
    return value


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `packed`; a tuple has become a list."""
    if isinstance(value, list):
        return [unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: unpacked(part, tensors) for key, part in value["entries"]}


def _write_batches(folder: Path, batches: Sequence[TrainingBatch], learner: Learner) -> None:
    """Write the micro-batches of a step, their tokenizers and their text into `folder`."""
    data = learner.loader.data
    named = [(index, name, tensor) for index, batch in enumerate(batches) for name, tensor in tensors_of(batch)]
    files.write_tensors(folder / BATCHES, {f"{index}.{name}": _copied(tensor) for index, name, tensor in named})
    tokenizers = dict.fromkeys((data.tokenizer, data.target_tokenizer))
    for tokenizer, file in zip(tokenizers, TOKENIZERS, strict=False):
        tokenizer.save(folder / file)
    lines = []
    for index, name, tensor in named:
        if name in ("source", "inputs", "targets"):
            tokenizer = data.tokenizer if name == "source" else data.target_tokenizer
            for row, ids in enumerate(tensor.tolist()):
                text = tokenizer.decode([token for token in ids if token != IGNORE], skip_special=False)
                lines.append(f"--- micro-batch {index}, row {row}, {name}\n{text}\n")
    (folder / TEXT).write_text("".join(lines), encoding="utf-8")


def tensors_of(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with their names."""
    for field in fields(batch.whole):
        if (tensor := getattr(batch.whole, field.name)) is not None:
            yield field.name, tensor


@dataclass(frozen=True)
class BlackBox:
    """The last step of a run that has diverged, and the state before it."""

    path: Path
    config: RunConfig
    machine: Resolved
    machine_in_words: str
    tokenizers: tuple[Tokenizer, ...]
    step: int
    """counted from 1"""
    loss: float | None
    grad_norm: float | None
    """as they were in training; None for a step that was not run"""
    state: dict[str, Any]
    """of the learner"""
    batches: tuple[TrainingBatch, ...]

    @classmethod
    def open(cls, path: Path) -> BlackBox:
        """The black box in the folder `path`; raises `UserError` if there is none, `StorageError` if it is damaged."""
        record = _checked_record(path)
        origin = str(path / RECORD)
        check_plugins(record.get("plugins"), origin)
        try:
            config = RunConfig.from_json(record["config"], origin)
            return cls(
                path,
                config,
                whole_record(Resolved, record["machine"], "its machine", origin),
                record["machine_in_words"],
                tuple(Tokenizer.load(path / name) for name in TOKENIZERS if name in record["sha256"]),
                record["step"],
                _figure(record["loss"]),
                _figure(record["grad_norm"]),
                dict(unpacked(record["state"], load_file(path / STATE))),
                _read_batches(path, config),
            )
        except (LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _figure(value: Any) -> float | None:
    return None if value is None else float(value)


def _damaged(path: Path, fault: str) -> StorageError:
    return StorageError(f"the black box {path} is damaged ({fault}): it cannot be repaired, resume the run instead")


def _checked_record(path: Path) -> dict[str, Any]:
    """The record of the black box at `path`, whose files have the checksums in it."""
    if not (path / RECORD).is_file():
        inside = f", such as {path / BLACK_BOX}" if (path / BLACK_BOX / RECORD).is_file() else ""
        raise UserError(f"{path} is not a black box (it has no {RECORD}): give the folder that a run has left{inside}")
    try:
        record = files.unsealed(read_json(path / RECORD, "resume the run instead"))
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has format {shown(record.get('format'))}, and this version reads {FORMAT}: update")
    digests = record.get("sha256")
    if not isinstance(digests, dict) or not {MODEL, STATE, BATCHES, TOKENIZERS[0]} <= digests.keys() <= FILES:
        raise _damaged(path, f"{RECORD} has no checksums of its files")
    for name, digest in digests.items():
        if not (path / name).is_file():
            raise _damaged(path, f"{name} is missing")
        if files.sha256(path / name) != digest:
            raise _damaged(path, f"{name} does not have the checksum in {RECORD}")
    return record


def _read_batches(folder: Path, config: RunConfig) -> tuple[TrainingBatch, ...]:
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / BATCHES).items():
        index, _, name = key.partition(".")
        parts.setdefault(int(index), {})[name] = tensor
    kind: Any = config.training.objective.variant.batch_type
    return tuple(kind(**parts[index]) for index in sorted(parts))
