"""GGUF files: written for llama.cpp, and opened as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from minitransformer.errors import StorageError, UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model
from minitransformer.pretrained.gguf_encoders import CLASSES, POOLING, POOLINGS
from minitransformer.pretrained.gguf_families import GGUFFamily
from minitransformer.pretrained.gguf_rope import DIVISORS
from minitransformer.pretrained.gguf_vocabularies import (
    TEMPLATE,
    TOKENS,
    gguf_vocabulary,
    token_key,
    tokenizer_of_gguf,
)
from minitransformer.pretrained.originals import CHAT
from minitransformer.pretrained.rules import save_weights
from minitransformer.pretrained.sentences import write_sentence_files
from minitransformer.pretrained.tokenizers import CONFIGS, FILE, SETTINGS

SUFFIX, MAGIC, PARTS = ".gguf", b"GGUF", "split.count"
READ_ONES = "use f16, q8_0, q4_0 or q4_k"
STORED = ("f16", "q8_0", "q4_0", "f32")
"""how matrices can be stored; norms, biases and positions are f32 in all"""
STEPS = {"f32": 0.0, "f16": 2**-11, "q8_0": 1 / 254, "q4_0": 1 / 8}
"""the largest error of a weight, of the largest one in its block of 32; of f16, of the weight itself"""
PLAIN = ("position_embd", "token_types", "attn_rel_b", "ffn_gate_inp", "attn_q_norm", "attn_k_norm")
NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "sep": "seperator", "mask": "mask"}
KEYS = {name: token_key(theirs) for name, theirs in NAMES.items()}
START = "decoder_start_token_id"
OF_LIBRARY = ("model_type", "architectures", "id2label", "label2id")
"""fields that only the transformers library has"""


def gguf_package() -> Any:
    """The package `gguf`; raises `UserError` without it."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install minitransformer[export]") from None
    return gguf


def write_gguf(
    model: Model, path: Path, family: str, stored: str, tokenizer: dict[str, Any], about: Mapping[str, Any]
) -> None:
    """Write `model` to the new file `path` for the architecture `family` of llama.cpp, with matrices `stored` as named.

    `tokenizer` is the content of a tokenizer.json, `about` is further metadata, such as the ids of special tokens.
    Raises `UserError` for settings and tokenizers that llama.cpp does not know.
    """
    gguf, kind, config = gguf_package(), GGUFFamily.named(family), model.config
    assert config.vocab_size is not None
    own = {key: value for key, value in kind.hf_config(config).items() if key not in (*OF_LIBRARY, *kind.present)}
    tensors = save_weights(model, config, kind.rules_for(config))
    tensors |= {name: torch.tensor(own[name]) for name in DIVISORS if name in own}
    writer = gguf.GGUFWriter(path, family)
    metadata = {
        key if key.startswith("tokenizer.") else f"{family}.{key}": value
        for key, value in own.items()
        if value is not None and key not in DIVISORS
    }
    for key, value in {**metadata, **gguf_vocabulary(tokenizer, config.vocab_size), **about}.items():
        _add(writer, key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        how = gguf.GGMLQuantizationType[_type_of(name, tensor, stored).upper()]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _type_of(name: str, tensor: Tensor, stored: str) -> str:
    """How a tensor is stored: blocks of 32 need rows that they divide."""
    if tensor.dim() < 2 or name.startswith(PLAIN) or any(f".{part}." in f".{name}." for part in PLAIN):
        return "f32"
    return "f16" if stored.startswith("q") and tensor.size(-1) % 32 else stored


class GGUFTensors(Mapping[str, Tensor]):
    """The tensors of a GGUF file by name, made float32 on access."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._tensors, self._path = {tensor.name: tensor for tensor in reader.tensors}, path
        self.factors: Mapping[str, float] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            found = torch.from_numpy(gguf_package().quants.dequantize(tensor.data, tensor.tensor_type).copy())
            return found * self.factors[name] if name in self.factors else found
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self._path} stores {name} as {kind}, which is not known: {READ_ONES}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader of a file that is whole, and the metadata."""
    gguf_package()
    from minitransformer.pretrained.gguf_reader import ArrayReader

    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is no GGUF file: give another one")
    try:
        reader = ArrayReader(path)
        ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, OSError) as error:
        if "GGMLQuantizationType" in str(error):
            raise UserError(
                f"{path} stores weights in a way that is not known to the package gguf: {READ_ONES}"
            ) from None
        raise StorageError(f"{path} is not a whole GGUF file: download it again") from None
    if (parts := metadata.get(PARTS, 1)) > 1:
        raise UserError(f"{path} is one of {parts} parts of a model: join them by llama-gguf-split --merge")
    if max(ends, default=0) > path.stat().st_size:
        raise StorageError(f"{path} is cut short: download it again")
    return reader, metadata


class GGUFFile:
    """An open GGUF file of a known architecture; raises `UserError` for another, `StorageError` for a damaged one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader, self.metadata = _read(path)
        self.tensors = GGUFTensors(reader, path)
        self.size = path.stat().st_size
        name = self.metadata.get("general.architecture")
        if name not in GGUFFamily.registry:
            known = ", ".join(GGUFFamily.registry)
            raise UserError(f"{path} holds the architecture {name!r}: known are {known}")
        self.family = GGUFFamily.named(name)
        self.own = {key.removeprefix(f"{name}."): value for key, value in self.metadata.items()}
        self.own |= {key: tensor in self.tensors for key, tensor in self.family.present.items()}
        self.own |= {name: tuple(self.tensors[name].tolist()) for name in DIVISORS if name in self.tensors}
        self.tensors.factors = self.family.factors(self.own)

    @property
    def config(self) -> ModelConfig:
        """Our configuration; raises `UserError` for a member that is not known."""
        return self.family.model_config({**self.own, "vocab_size": len(self.metadata.get(TOKENS, []))})

    def write_texts(self, folder: Path) -> None:
        """Write what texts need to `folder`, as a checkpoint of the transformers library has it.

        Raises `UserError` for a tokenizer that is not known, or damaged.
        """
        try:
            self._write_texts(folder)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"the tokenizer of {self.path} is damaged ({error!r}): download it again") from None

    def _write_texts(self, folder: Path) -> None:
        ids = {name: self.metadata[key] for name, key in KEYS.items() if key in self.metadata}
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= {f"{name}_token": self.metadata[TOKENS][number] for name, number in ids.items()}
        files = {FILE: tokenizer_of_gguf(self.metadata), SETTINGS: settings, CONFIGS[0]: self._token_fields(ids)}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        if TEMPLATE in self.metadata:
            (folder / CHAT).write_text(self.metadata[TEMPLATE], encoding="utf-8")
        for name, number in POOLINGS.items():
            if self.own.get(POOLING) == number:
                write_sentence_files(folder, name)

    def _token_fields(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """The fields of config.json on special tokens."""
        fields: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
        ends = [self.metadata[key] for key in map(token_key, ("eos", "eot", "eom")) if key in self.metadata]
        if len(dict.fromkeys(ends)) > 1:
            fields["eos_token_id"] = list(dict.fromkeys(ends))
        if (start := self.own.get(START)) is not None:
            fields |= {"is_encoder_decoder": True, START: start}
        if (labels := self.own.get(CLASSES)) is not None:
            fields["id2label"] = {str(number): label for number, label in enumerate(labels)}
        return fields


def is_gguf(name: str | Path) -> bool:
    """Whether `name` is a GGUF file."""
    return str(name).endswith(SUFFIX) and Path(name).is_file()


@contextmanager
def texts_of_gguf(file: GGUFFile) -> Iterator[Path]:
    """A temporary folder with what the texts of a GGUF file need."""
    with TemporaryDirectory() as folder:
        file.write_texts(Path(folder))
        yield Path(folder)
