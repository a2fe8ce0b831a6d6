"""Folders of the sentence-transformers library, which say how hidden states become the embedding of a text.

Their modules.json lists what is applied in turn: Transformer, Pooling, and in some Normalize.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer.errors import StorageError, UserError
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.pretrained.tokenizers import SETTINGS
from minitransformer.records import checked_fields, checked_value, parse_json, read_bytes

MODULES, POOLING, NORMALIZE = "modules.json", "1_Pooling/config.json", "2_Normalize/config.json"
TEXTS, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
SENTENCE_FILES = (MODULES, POOLING, NORMALIZE, TEXTS, PROMPTS)
KINDS = ["Transformer", "Pooling", "Normalize"]
FLAG = "pooling_mode_"
UNLIMITED = 1 << 31
"""tokenizers without a limit are said to have one beyond this"""
# The library's poolings, by name or in older files as one flag for each, and ours.
POOLING_NAMES = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first", "lasttoken": "last"}


@dataclass(frozen=True)
class SentenceSettings:
    """How a checkpoint turns a text into an embedding."""

    pooling: str
    """mean, first or last; any other is the library's name"""
    normalised: bool
    most_tokens: int | None = None
    """longest sequence, special tokens included; None is the context length"""
    lower_case: bool = False
    prompt: str = ""
    """what precedes each text"""
    pools_prompt: bool = True


def module_kinds(folder: Path) -> list[str]:
    """The kinds of modules of a sentence-transformers folder, in order; empty for any other folder.

    Raises `UserError` for modules that are not supported.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules: Any = parse_json(read_bytes(path, "download it again"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        places = [module["path"] for module in modules[:2]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is damaged ({error!r}): download it again") from None
    if kinds not in (KINDS[:2], KINDS) or places != ["", Path(POOLING).parent.name]:
        found = ", ".join(f"{kind} in {place!r}" if place else kind for kind, place in zip(kinds, places, strict=False))
        raise UserError(
            f"{path} has the modules {', '.join([found, *kinds[2:]])}, and supported are Transformer, Pooling in "
            f"{Path(POOLING).parent.name!r}, and Normalize: remove the file to use the Transformer alone"
        )
    return kinds


def sentence_settings(folder: Path) -> SentenceSettings | None:
    """How the sentence-transformers folder `folder` embeds a text; None for any other folder.

    Raises `UserError` for modules that are not supported.
    """
    if not (kinds := module_kinds(folder)):
        return None
    texts, prompts = _optional(folder / TEXTS), _optional(folder / PROMPTS)
    named = checked_value(prompts.get("prompts", {}), dict, "prompts", str(folder / PROMPTS))
    pooling = read_checkpoint_json(folder / POOLING)
    settings = {
        "pooling": _pooling(pooling),
        "normalised": kinds == KINDS,
        "most_tokens": _most_tokens(folder, texts),
        "lower_case": texts.get("do_lower_case", False),
        "prompt": named.get(prompts.get("default_prompt_name"), ""),
        "pools_prompt": pooling.get("include_prompt", True),
    }
    return SentenceSettings(**checked_fields(SentenceSettings, settings, str(folder)))


def write_sentence_files(folder: Path, pooling: str) -> None:
    """Make the checkpoint folder `folder` one of sentence-transformers, with this pooling."""
    names = {ours: theirs for theirs, ours in POOLING_NAMES.items()}
    place = Path(POOLING).parent.name
    of = "sentence_transformers.models."
    modules = [{"path": path, "type": of + kind} for path, kind in zip(("", place), KINDS[:2], strict=True)]
    (folder / place).mkdir()
    for name, content in {MODULES: modules, POOLING: {FLAG.rstrip("_"): names[pooling]}}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _most_tokens(folder: Path, texts: dict[str, Any]) -> Any:
    """The longest sequence by the configuration `texts`, or, in newer folders, by that of the tokenizer."""
    found = texts.get("max_seq_length")
    most = _optional(folder / SETTINGS).get("model_max_length") if found is None else found
    return None if isinstance(most, int | float) and most > UNLIMITED else most


def _optional(path: Path) -> dict[str, Any]:
    return read_checkpoint_json(path) if path.is_file() else {}


def _pooling(content: dict[str, Any]) -> str:
    """The name of the pooling in `content`; of several, whose outputs the library joins, all names with a + between."""
    modes = content.get(FLAG.rstrip("_"))
    if modes is None:
        flags = {f"{FLAG}mean_tokens": True, **content}
        modes = [flag.removeprefix(FLAG) for flag, on in flags.items() if flag.startswith(FLAG) and on is True]
    names = modes if isinstance(modes, list) else [modes]
    return "+".join(POOLING_NAMES.get(str(name), str(name)) for name in names)
