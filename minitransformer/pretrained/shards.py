"""Tensors on disk in the `transformers` layout: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitransformer import files, records
from minitransformer.errors import StorageError, UserError
from minitransformer.records import shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-{number:05}-of-{count:05}.safetensors"
SHARD_BYTES = 5_000_000_000


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, read on access."""

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            self._places = _places(folder / INDEX)
        elif (folder / WEIGHTS).is_file():
            self._places = dict.fromkeys(_opened(folder / WEIGHTS).keys(), WEIGHTS)
        else:
            raise _no_weights(folder)
        self.folder = folder
        shards = sorted(set(self._places.values()))
        missing = [shard for shard in shards if not isfile(folder / shard)]
        if missing:
            raise StorageError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: download it again")
        self._files = {shard: _opened(folder / shard) for shard in shards}

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum((self.folder / shard).stat().st_size for shard in self._files)

    def __getitem__(self, name: str) -> Tensor:
        shard = self._places[name]
        try:
            tensor: Tensor = self._files[shard].get_tensor(name)
        except SafetensorError:
            raise StorageError(f"{shard} lacks {name}, which {INDEX} places there: download both again") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Renamed(Mapping[str, Tensor]):
    """Tensors under current names, with the prefix that files of a headless model omit."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        bare = bool(prefix) and not any(name.startswith(prefix) for name in tensors)
        self._tensors = tensors
        self._names = {_modern((prefix if bare else "") + name): name for name in tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _modern(name: str) -> str:
    """The current name of a tensor: early checkpoints called norm weights gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def write_shards(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors` to `folder`: one file, or shards of at most `shard_bytes` with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.cpu()
        room -= tensor.nbytes
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [SHARDS.format(number=i, count=count) for i in range(1, count + 1)]
    for file, shard in zip(names, shards, strict=True):
        files.write_tensors(folder / file, shard, {"format": "pt"})
    if count > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _places(index: Path) -> dict[str, str]:
    """The shard of each tensor; raises `StorageError` for a name that is not a file in the folder of `index`."""
    places = read_checkpoint_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise StorageError(f"{index} is damaged (it has no object weight_map): download it again")
    for shard in places.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise StorageError(f"{index} names {shown(shard)}, which is not a file in its folder: download it again")
    return places


def read_checkpoint_json(path: Path) -> dict[str, Any]:
    """The object in the file at `path`; raises `StorageError` if it holds none."""
    return records.read_json(path, "download it again")


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}"))
    if pickles:
        return UserError(
            f"{folder / pickles[0]} is a pickle, which can execute arbitrary code when opened: "
            "if you trust it, convert it to safetensors"
        )
    return UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}: give the folder of a checkpoint")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, MemoryError, SafetensorError) as error:
        raise StorageError(f"{path} is not a complete safetensors file ({error}): download it again") from None
