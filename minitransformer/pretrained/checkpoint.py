"""Checkpoint folders as the `transformers` library keeps them: config.json and safetensors, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import Model, build_model
from minitransformer.pretrained import bert, gpt, llama, seq2seq  # noqa: F401  (each registers its families)
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.rules import load_weights, save_weights
from minitransformer.pretrained.tokenizers import load_tokenizer
from minitransformer.text.tokenizers import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
REMEDY = "choose another folder"


class Shards(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            places = _json(folder / INDEX)["weight_map"]
        elif (folder / WEIGHTS).is_file():
            with _opened(folder / WEIGHTS) as file:
                places = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin")) or sorted(p.name for p in folder.glob("*.pt"))
            if pickled:
                raise UserError(
                    f"{folder / pickled[0]} is a pickle, which may run any code when it is opened: "
                    "convert it to safetensors where you trust it"
                )
            raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}: give the folder of a checkpoint")
        missing = sorted({shard for shard in places.values() if not (folder / shard).is_file()})
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names: download it again")
        self._files = {name: folder / shard for name, shard in places.items()}

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, each still read when it is asked for."""

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
    """The first checkpoints called the weights of a norm gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def load(name: str | Path) -> tuple[Model, Tokenizer | None]:
    """The model and, if there is one, the tokenizer in the folder `name`, or of that name on the Hugging Face hub.

    Weights become float32. Raises `UserError` for what is not such a checkpoint, or none that our architecture covers.
    """
    folder = _folder(name)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: give the folder of a checkpoint")
    hf = _json(folder / CONFIG)
    family = Family.named(str(hf.get("model_type")))
    config = family.model_config(_with_file_facts(hf, folder))
    model = build_model(config).eval()
    load_weights(model, config, _Renamed(Shards(folder), family.prefix), family.rules_for(config), family.ignored)
    return model, load_tokenizer(folder)


def save(model: Model, folder: str | Path, family: str, extra: Mapping[str, Any] | None = None) -> None:
    """Write `model` into the new folder `folder`, as the `transformers` library opens checkpoints of `family`.

    `extra` are fields of config.json that are no property of the model, such as the ids of special tokens. Raises
    `UserError` naming the field that the family cannot hold.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder")
    kind = Family.named(family)
    hf = {**kind.hf_config(model.config), "dtype": "float32", **(extra or {})}
    tensors = save_weights(model, model.config, kind.rules_for(model.config))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(folder, REMEDY), files.whole_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial / WEIGHTS, {"format": "pt"})


def _folder(name: str | Path) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name}: give the folder of a checkpoint, or a name on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder {name}, and fetching it from the hub takes `pip install minitransformer[hub]`"
        ) from None
    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of requests, of the hub's own kinds, of the file system
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is no folder, and the hub gives nothing ({reason}): check name and network") from None


def _with_file_facts(hf: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration, with what only the tensors say: whether the head has weights of its own."""
    return {**hf, "has_head": any(name.endswith("lm_head.weight") for name in Shards(folder))}


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
    return content


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): download it again") from None
