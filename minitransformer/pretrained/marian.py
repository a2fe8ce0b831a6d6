"""Marian's tokenizers: a SentencePiece model for each side, which share one vocabulary."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.pretrained.vocabularies import VOCABULARY, token_name
from minitransformer.records import read_bytes
from minitransformer.text.tokenizers import Texts, Tokenizer, check_ids
from minitransformer.text.tokenizers.base import not_text, special_tokens_in, typed_entry

SOURCE, TARGET = "source.spm", "target.spm"
NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""special tokens and their usual spelling"""
# A source of a model for several languages begins with that of its target.
LANGUAGE = re.compile(r">>.*?<<", re.DOTALL)


class SentencePiece(Tokenizer, name="sentencepiece"):
    """Text to pieces by a SentencePiece model, run by its own library, and pieces to ids by another vocabulary.

    Kudo and Richardson 2018 (arXiv 1808.06226); with Marian's vocabulary, a leading >>language<< is one piece.
    """

    def __init__(
        self, model: bytes, vocabulary: dict[str, int], special_tokens: dict[str, int], *, end: int, unknown: int
    ) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError(
                "this tokenizer needs the sentencepiece package: pip install minitransformer[hub]"
            ) from None
        self.model, self.vocabulary, self.special_tokens = model, vocabulary, special_tokens
        self.end_of_text, self.unknown = end, unknown
        every = [*vocabulary.values(), *special_tokens.values(), end, unknown]
        if not all(type(number) is int and number >= 0 for number in every) or end not in special_tokens.values():
            raise ValueError("its vocabulary has no numbers, or none of the end-of-text token")
        self.vocab_size = check_ids(max(every)) + 1
        try:
            self._implementation = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"the sentencepiece package cannot read the model ({error}): download it again") from None
        # A special token that is spelled out is no token.
        self._ids = {piece: number for piece, number in vocabulary.items() if number not in special_tokens.values()}
        self.pieces = [b""] * self.vocab_size
        for piece, number in self._ids.items():
            self.pieces[number] = self._bytes_of(piece)

    def _bytes_of(self, piece: str) -> bytes:
        is_byte = self._implementation.is_byte(self._implementation.piece_to_id(piece))
        return bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        raise UserError("a SentencePiece model cannot be trained here: choose bpe, bytes or chars")

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        language = LANGUAGE.match(text)
        pieces = [language.group()] if language else []
        try:
            pieces += self._implementation.encode(text[language.end() :] if language else text, out_type=str)
        except UnicodeEncodeError as error:
            raise not_text(error) from None
        return np.array([self._ids.get(piece, self.unknown) for piece in pieces], np.uint32)

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        return super().decode(ids, skip_special=skip_special).strip()

    def shares_ids(self, other: Tokenizer) -> bool:
        return isinstance(other, SentencePiece) and other.vocabulary == self.vocabulary

    def to_json(self) -> dict[str, Any]:
        model = base64.b64encode(self.model).decode()
        return self._described(
            model=model, vocabulary=self.vocabulary, end_of_text=self.end_of_text, unknown=self.unknown
        )

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        model, vocabulary = base64.b64decode(content["model"]), typed_entry(content, "vocabulary", dict)
        ends = {"end": content["end_of_text"], "unknown": content["unknown"]}
        return cls(model, vocabulary, special_tokens_in(content), **ends)


def marian_tokenizer(folder: Path, settings: dict[str, Any], side: str = SOURCE) -> SentencePiece | None:
    """The tokenizer of sources, or of targets, in a folder of Marian; None if it has no SentencePiece models.

    Raises `UserError` for an incomplete folder, and for one with a vocabulary for each side.
    """
    if not (folder / SOURCE).is_file():
        return None
    if settings.get("separate_vocabs"):
        raise UserError(f"{folder} has a vocabulary for each side (separate_vocabs), which is not supported")
    if missing := [name for name in (TARGET, VOCABULARY) if not (folder / name).is_file()]:
        raise UserError(f"{folder} has {SOURCE}, but no {' and no '.join(missing)}: download it again")
    vocabulary = read_checkpoint_json(folder / VOCABULARY)
    names = {kind: token_name(settings.get(kind, usual)) for kind, usual in NAMES.items()}
    if absent := [name for name in names.values() if name not in vocabulary]:
        raise UserError(f"{folder / VOCABULARY} lacks {', '.join(absent)}: download it again")
    special = {name: vocabulary[name] for name in names.values()}
    end, unknown = vocabulary[names["eos_token"]], vocabulary[names["unk_token"]]
    return SentencePiece(read_bytes(folder / side, "download it again"), vocabulary, special, end=end, unknown=unknown)
