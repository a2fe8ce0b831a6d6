"""Export of our tokenizers to the files of public checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.pretrained.tokenizers import CHARACTERS, FILE, SETTINGS, SPLITS, PublicTokenizer
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, MASKS, Bytes, Characters, Tokenizer

# Names of padding tokens in different families.
PADDINGS = ("<pad>", "[PAD]")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer` to a checkpoint folder, for the `tokenizers` and `transformers` packages."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    ids = special_ids(tokenizer)
    end = names[tokenizer.end_of_text]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    settings |= {name: names.get(ids[f"{name}_id"], end) for name in ("bos_token", "pad_token")}
    if masks := [name for name in MASKS if name in tokenizer.special_tokens]:
        settings["mask_token"] = masks[0]
    (folder / FILE).write_text(json.dumps(described(tokenizer), ensure_ascii=False), encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of config.json on how texts start and end, for every kind of model."""
    end, ends = tokenizer.end_of_text, list(tokenizer.ends)
    padding = [tokenizer.special_tokens[name] for name in PADDINGS if name in tokenizer.special_tokens]
    return {
        "bos_token_id": next(iter(tokenizer.framing.prefix), end),
        "eos_token_id": ends if len(ends) > 1 else end,
        "pad_token_id": next(iter(padding), end),
    }


def target_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of config.json on how targets start and end, for encoder-decoders."""
    framing = tokenizer.framing
    ids = {
        "decoder_start_token_id": tokenizer.target_start,
        "forced_bos_token_id": framing.forced_bos,
        "forced_eos_token_id": framing.forced_eos,
    }
    return {**ids, "bad_words_ids": [[token] for token in framing.suppressed]} if framing.suppressed else ids


@singledispatch
def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json equivalent to `tokenizer`."""
    raise UserError(f"{FILE} cannot represent the {tokenizer.name} tokenizer: leave it out")


@described.register
def _(tokenizer: PublicTokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer._implementation.to_str())
    return content


@described.register
def _(tokenizer: BPE) -> dict[str, Any]:
    return _byte_level(tokenizer, tokenizer.ranks, tokenizer.pattern)


@described.register
def _(tokenizer: Bytes) -> dict[str, Any]:
    return _byte_level(tokenizer, tokenizer.pieces[:256], r"[\s\S]+")


@described.register
def _(tokenizer: Characters) -> dict[str, Any]:
    vocab = {character: number for number, character in enumerate(tokenizer.characters)}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": END_OF_TEXT}
    return _file(tokenizer, model, split, {"type": "Fuse"})


def _byte_level(tokenizer: Tokenizer, ranks: Sequence[bytes], pattern: str) -> dict[str, Any]:
    spelled = ["".join(CHARACTERS[byte] for byte in token) for token in ranks]
    vocab = {token: number for number, token in enumerate(spelled)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    file_pattern = {ours: theirs for theirs, ours in SPLITS.items()}.get(pattern, pattern)
    split = {"type": "Split", "pattern": {"Regex": file_pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": vocab, "merges": list(_merges(spelled, vocab)), "ignore_merges": True}
    return _file(tokenizer, model, {"type": "Sequence", "pretokenizers": [split, byte_level]}, byte_level)


def _merges(tokens: Sequence[str], vocab: dict[str, int]) -> Iterable[list[str]]:
    """Every pair of tokens that forms a token, in the order of the result: tiktoken merges all of them."""
    for token in tokens:
        pairs = ([token[:i], token[i:]] for i in range(1, len(token)))
        yield from (pair for pair in pairs if pair[0] in vocab and pair[1] in vocab)


def _file(
    tokenizer: Tokenizer, model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any]
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(tokenizer.special_tokens.items(), key=lambda entry: entry[1])
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": name, **flags} for name, number in special],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(tokenizer),
        "model": model,
        "decoder": decoder,
    }


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The post-processor that adds special tokens around a text, if any."""
    framing, names = tokenizer.framing, {number: name for name, number in tokenizer.special_tokens.items()}
    if not framing.length:
        return None
    single = [
        *({"SpecialToken": {"id": names[token], "type_id": 0}} for token in framing.prefix),
        {"Sequence": {"id": "A", "type_id": 0}},
        *({"SpecialToken": {"id": names[token], "type_id": 0}} for token in framing.suffix),
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    used = {
        names[token]: {"id": names[token], "ids": [token], "tokens": [names[token]]} for token in framing.around([])
    }
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}
