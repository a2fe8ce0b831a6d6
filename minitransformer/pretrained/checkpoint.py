"""Checkpoint folders as the `transformers` library keeps them, and their names on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import Model, build_model, check_size
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.originals import TOKENIZER_FILES, write_originals
from minitransformer.pretrained.rules import load_weights, save_weights
from minitransformer.pretrained.shards import (
    INDEX,
    SHARDS,
    WEIGHTS,
    Renamed,
    Shards,
    read_checkpoint_json,
    write_shards,
)
from minitransformer.pretrained.tokenizer_files import save_tokenizer
from minitransformer.pretrained.tokenizers import CONFIGS, load_tokenizer
from minitransformer.text.tokenizers import Tokenizer

CONFIG, GENERATION = CONFIGS
# What is fetched from the hub: some repositories hold the same weights in several formats.
WANTED = [
    *CONFIGS,
    *TOKENIZER_FILES,
    WEIGHTS,
    INDEX,
    SHARDS.format(number=0, count=0).replace("00000", "*"),
]


class Undrawn(TorchFunctionMode):
    """While this is active, new weights are not drawn: they hold what memory held, until they are filled."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def load(name: str | Path) -> tuple[Model, Tokenizer | None]:
    """The model and, if there is one, the tokenizer in the folder `name`, or of that name on the Hugging Face hub.

    Weights become float32. Raises `UserError` for what is not such a checkpoint, or none that our architecture covers.
    """
    folder = checkpoint_folder(name)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: give the folder of a checkpoint")
    hf = read_checkpoint_json(folder / CONFIG)
    if not isinstance(hf.get("model_type"), str):
        raise UserError(f"{folder / CONFIG} has no model_type: give the folder of a checkpoint")
    if hf["model_type"] not in Family.registry:  # a name that is nearly this one would be another model
        raise UserError(f"unknown model_type {hf['model_type']!r}: known are {', '.join(Family.registry)}")
    family = Family.named(hf["model_type"])
    shards = Shards(folder)
    tensors = Renamed(shards, family.prefix)
    # Whether the head has weights of its own is not always in the configuration.
    config = family.model_config({**hf, "has_head": "lm_head.weight" in tensors})
    check_size(config, len(shards), shards.size, str(folder))
    with Undrawn():
        model = build_model(config).eval()
    load_weights(model, config, tensors, family.rules_for(config), family.ignored)
    return model, load_tokenizer(folder)


def generation_config(name: str | Path) -> dict[str, Any] | None:
    """How the publisher would have the checkpoint called `name` generate, if there is a file that says so."""
    path = checkpoint_folder(name) / GENERATION
    return read_checkpoint_json(path) if path.is_file() else None


def save(
    model: Model,
    folder: str | Path,
    family: str,
    extra: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    originals: Path | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write `model` into the new folder `folder`, as the `transformers` library opens checkpoints of `family`.

    `extra` are fields of config.json that are no property of the model, such as the ids of special tokens. The files of
    the tokenizer are made from `tokenizer`, or copied from the folder `originals`; `generation` is what
    `generation_config` read. Raises `UserError` naming the settings that the family cannot hold.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder")
    kind = Family.named(family)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    # What a family needs to be what it is stands above what anybody adds.
    hf = {**kind.hf_config(model.config), "dtype": dtype, **(extra or {}), **kind.required}
    tensors = save_weights(model, model.config, kind.rules_for(model.config))
    with files.writing(folder, "choose another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_folder(folder) as partial:
            (partial / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
            write_shards(tensors, partial)
            if originals is not None:
                write_originals(originals, partial)
            elif tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            if generation is not None:
                (partial / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def checkpoint_folder(name: str | Path) -> Path:
    """The folder `name`, or that of a snapshot of the checkpoint of that name on the hub, which is fetched first."""
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
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # of requests, of the hub's own kinds, of the file system
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is no folder, and the hub gives nothing ({reason}): check name and network") from None
