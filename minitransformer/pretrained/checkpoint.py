"""Checkpoint folders of the `transformers` library, and checkpoints on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from minitransformer import files
from minitransformer.errors import StorageError, UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model, check_memory, check_size, in_full_precision
from minitransformer.pretrained.families import Family
from minitransformer.pretrained.gguf_files import SUFFIX, GGUFFile, is_gguf, texts_of_gguf
from minitransformer.pretrained.originals import CHAT, TOKENIZER_FILES, write_originals
from minitransformer.pretrained.refusals import check_kind
from minitransformer.pretrained.rules import load_weights, save_weights
from minitransformer.pretrained.sentences import SENTENCE_FILES
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
# Files to fetch from the hub: some repositories have the same weights in several formats.
WANTED = [
    *CONFIGS,
    *TOKENIZER_FILES,
    *SENTENCE_FILES,
    WEIGHTS,
    INDEX,
    SHARDS.format(number=0, count=0).replace("00000", "*"),
]
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


class Undrawn(TorchFunctionMode):
    """While active, new weights are not initialised, because they will be loaded."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def load(name: str | Path) -> tuple[Model, Tokenizer | None]:
    """The model and, if any, the tokenizer of the folder or Hugging Face hub checkpoint `name`.

    Weights are converted to float32. `name` may be a GGUF file. Raises `UserError` for an invalid or unsupported
    checkpoint.
    """
    if is_gguf(name):
        return load_gguf(GGUFFile(Path(name)))
    folder = checkpoint_folder(name)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: give the folder of a checkpoint")
    hf = read_checkpoint_json(folder / CONFIG)
    if not isinstance(hf.get("model_type"), str):
        raise UserError(f"{folder / CONFIG} has no model_type: give the folder of a checkpoint")
    check_kind(hf, folder / CONFIG)
    family = Family.named(hf["model_type"])
    shards = Shards(folder)
    tensors = Renamed(shards, family.prefix)
    # The configuration does not always say whether the head is tied.
    config = family.model_config({**hf, "has_head": "lm_head.weight" in tensors})
    return _filled(config, tensors, shards.size, family, str(folder)), load_tokenizer(folder)


def load_gguf(file: GGUFFile) -> tuple[Model, Tokenizer | None]:
    """The model and the tokenizer of a GGUF file."""
    model = _filled(file.config, file.tensors, 8 * file.size, file.family, str(file.path))  # 4 bits a weight, and less
    with texts_of_gguf(file) as folder:
        return model, load_tokenizer(folder)


def _filled(config: ModelConfig, tensors: Mapping[str, Tensor], size: int, family: type[Family], origin: str) -> Model:
    """The model of `config` with the tensors of a file of `size` bytes."""
    check_size(config, len(tensors), size, origin)
    check_memory(config, origin)
    with Undrawn():
        model = build_model(config).eval()
    load_weights(model, config, tensors, family.rules_for(config), family.ignored)
    return model


def with_zero_biases(model: Model, kind: type[Family]) -> Model:
    """`model`, or, if the family always has biases that it lacks, the same one with zeros there."""
    config = kind.widened(model.config)
    if config == model.config:
        return model
    with Undrawn():
        wider = build_model(config).to(next(model.parameters()).dtype).eval()
    for name in wider.load_state_dict(model.state_dict(), strict=False).missing_keys:
        wider.get_parameter(name).data.zero_()
    return wider


@contextmanager
def checkpoint_files(name: str | Path) -> Iterator[Path]:
    """The folder with the files besides the weights of the checkpoint `name`, or with what a GGUF file says."""
    if is_gguf(name):
        with texts_of_gguf(GGUFFile(Path(name))) as folder:
            yield folder
    else:
        yield checkpoint_folder(name)


def generation_config(name: str | Path) -> dict[str, Any] | None:
    """The published generation settings of the checkpoint `name`, if any."""
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
    chat_template: str | None = None,
) -> None:
    """`write_public` to the new folder `folder`, which is whole or absent; raises `UserError` if it exists."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} already exists: choose another folder")
    with files.writing(folder, "choose another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_folder(folder) as partial:
            write_public(
                model,
                partial,
                family,
                extra,
                tokenizer=tokenizer,
                originals=originals,
                generation=generation,
                chat_template=chat_template,
            )


def write_public(
    model: Model,
    folder: Path,
    family: str,
    extra: Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    originals: Path | None = None,
    generation: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write `model`, all matrices in full, to the empty folder `folder` as a `transformers` checkpoint of `family`.

    `extra` are further fields of config.json, such as the ids of special tokens. Tokenizer files are made from
    `tokenizer`, or copied from the folder `originals`; `generation` is as from `generation_config`, and
    `chat_template` the source of one. Raises `UserError` with the settings that the family cannot represent.
    """
    kind = Family.named(family)
    model = with_zero_biases(in_full_precision(model), kind)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    # The family's own fields take precedence over additional ones.
    hf = {**kind.hf_config(model.config), "dtype": dtype, **(extra or {}), **kind.required}
    tensors = save_weights(model, model.config, kind.rules_for(model.config))
    if model.config.topology == "encoder-headless":
        tensors = {name.removeprefix(kind.prefix): tensor for name, tensor in tensors.items()}
    (folder / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    write_shards(tensors, folder)
    write_text_files(folder, tokenizer, originals, generation, chat_template)


def write_text_files(
    folder: Path,
    tokenizer: Tokenizer | None,
    originals: Path | None,
    generation: Mapping[str, Any] | None,
    chat_template: str | None,
) -> None:
    """Write what texts need, as in `write_public`."""
    if originals is not None:
        write_originals(originals, folder)
    elif tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if generation is not None:
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if chat_template is not None:
        (folder / CHAT).write_text(chat_template, encoding="utf-8")


def may_be_on_hub(name: str) -> bool:
    """Whether `name` can be NAME or OWNER/NAME on the hub: where it or OWNER exists here, it is a path."""
    is_path = name.endswith(SUFFIX) or Path(name).exists() or ("/" in name and Path(name).parent.exists())
    return HUB_NAME.fullmatch(name) is not None and not is_path


def is_checkpoint(name: str) -> bool:
    """Whether `name` is a public checkpoint, and no run: a folder or GGUF file, or else a name on the hub."""
    if is_gguf(name):
        return True
    if not Path(name).is_dir():
        return may_be_on_hub(name)
    try:
        config = read_checkpoint_json(Path(name) / CONFIG)
    except StorageError:  # there is none, or it is damaged
        return False
    return "model_type" in config and "model" not in config


def checkpoint_digest(checkpoint: Path) -> str:
    """The SHA-256 of all files of the checkpoint in a folder or GGUF file, and of the version that reads them."""
    found = {path for pattern in WANTED for path in checkpoint.glob(pattern)} | {checkpoint}
    digests = [f"{path.relative_to(checkpoint)} {files.sha256(path)}" for path in sorted(found) if path.is_file()]
    return hashlib.sha256("\n".join([version("minitransformer"), *digests]).encode()).hexdigest()


def checkpoint_folder(name: str | Path) -> Path:
    """The folder `name`, or the downloaded snapshot of the hub checkpoint `name`."""
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or not may_be_on_hub(name):
        what = "file" if str(name).endswith(SUFFIX) else "folder"
        raise UserError(f"there is no {what} {name}: give a checkpoint {what}, or a name on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"there is no folder {name}, and downloading it from the hub needs `pip install minitransformer[hub]`"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # of requests, of the hub's own kinds, of the file system
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not a folder, and cannot be downloaded from the hub ({reason}): check name and network"
        ) from None
