"""SentencePiece files of T5, mT5, XLM-RoBERTa and CamemBERT, converted to the content of a tokenizer.json.

The file is a protocol buffer, of which the few fields that count are read here: `sentencepiece_model.proto` of the
sentencepiece library.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.pretrained.vocabularies import added_token, token_name
from minitransformer.records import read_bytes
from minitransformer.text.tokenizers import check_ids

# What families put before and after the file's pieces, of which they leave out the first; names are those of settings.
T5_FILE, BERT_FILE = "spiece.model", "sentencepiece.bpe.model"
UNUSED = -100.0
"""score of a piece that is never chosen"""
UNIGRAM, CONTROL, USER_DEFINED = 1, 3, 4
NAMES = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
Pieces = list[tuple[str, float]]


@dataclass(frozen=True)
class UnigramModel:
    """The content of a file: pieces with their scores, those that no text spells, and the map of characters."""

    pieces: Pieces
    reserved: list[str]
    characters: bytes


def content_of_unigram(folder: Path, settings: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    """The content of a tokenizer.json for the SentencePiece file in `folder`; None without one of a known family.

    `settings` are those of tokenizer_config.json. Raises `UserError` for a damaged file.
    """
    file = folder / {"t5": T5_FILE, "mt5": T5_FILE}.get(model_type, BERT_FILE)
    if model_type not in ("t5", "mt5", "xlm-roberta", "camembert") or not file.is_file():
        return None
    names = {kind: token_name(settings.get(kind, usual)) for kind, usual in NAMES.items()}
    model = read_unigram(file)
    vocabulary, special = _arranged(model, names, model_type, settings.get("extra_ids", 100))
    ids = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    if missing := [name for name in special if name not in ids]:
        raise UserError(f"{file} lacks {', '.join(missing)}: use the file of a {model_type} model")
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.characters).decode()}
    around = [names["eos_token"]] if model_type in ("t5", "mt5") else [names["bos_token"], names["eos_token"]]
    return {
        "added_tokens": [added_token(ids[name], name) for name in sorted(special, key=ids.__getitem__)],
        "normalizer": charsmap if model.characters else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
        "post_processor": _post_processor(around, ids),
        "decoder": METASPACE,
        "model": {"type": "Unigram", "unk_id": ids[names["unk_token"]], "vocab": vocabulary, "byte_fallback": False},
    }


def _arranged(
    model: UnigramModel, names: dict[str, str], model_type: str, extra_ids: int
) -> tuple[Pieces, dict[str, None]]:
    """The vocabulary in the family's order of ids, and its special tokens."""
    bos, pad, eos, unknown, mask = names.values()
    match model_type:
        case "xlm-roberta":
            first = [(bos, 0.0), (pad, 0.0), (eos, 0.0), (unknown, 0.0)]
            vocabulary = [*first, *model.pieces[3:], (mask, 0.0)]
            special = [bos, pad, eos, unknown, mask]
        case "camembert":
            first = [("<s>NOTUSED", 0.0), (pad, 0.0), ("</s>NOTUSED", 0.0), (unknown, 0.0), ("<unk>NOTUSED", UNUSED)]
            vocabulary = [*first, *model.pieces[1:], (mask, 0.0)]
            special = [bos, pad, eos, unknown, mask, "<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]
        case _:
            sentinels = [f"<extra_id_{number}>" for number in reversed(range(check_ids(extra_ids)))]
            vocabulary = [*model.pieces, *((name, 0.0) for name in sentinels)]
            special = [pad, eos, unknown, *sentinels]
    known = {piece for piece, _ in vocabulary}
    return vocabulary, dict.fromkeys([*special, *(name for name in model.reserved if name in known)])


def _post_processor(around: list[str], ids: dict[str, int]) -> dict[str, Any]:
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in around]
    single = [*pieces[:-1], {"Sequence": {"id": "A", "type_id": 0}}, pieces[-1]]
    pair = [*single, *([pieces[-1]] if pieces[:-1] else []), {"Sequence": {"id": "B", "type_id": 0}}, pieces[-1]]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in around}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def read_unigram(file: Path) -> UnigramModel:
    """The model in a SentencePiece file; raises `UserError` for a damaged file, and for one of another kind."""
    pieces: Pieces = []
    reserved, characters, kind = [], b"", UNIGRAM
    try:
        for field, value in _fields(read_bytes(file, "download it again")):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0))
                reserved += [pieces[-1][0]] if piece.get(3, 1) in (CONTROL, USER_DEFINED) else []
            elif field == 2:
                kind = dict(_fields(value)).get(3, UNIGRAM)
            elif field == 3:
                characters = dict(_fields(value)).get(2, b"")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"{file} is damaged ({error!r}): download it again") from None
    if not pieces:
        raise UserError(f"{file} is damaged (it has no pieces): download it again")
    if kind != UNIGRAM:
        raise UserError(f"{file} is no unigram model, and only such can be read: use the file that was published")
    return UnigramModel(pieces, reserved, characters)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and the value of each field of a protocol buffer: an integer, or the bytes of anything else."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        match key & 7:
            case 0:
                value, place = _varint(message, place)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, place = _varint(message, place)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"no field is of kind {kind}")
        if place + size > len(message):
            raise ValueError("it is cut short")
        yield key >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise ValueError("an integer has more than ten bytes")
