"""Tokenizers from any tokenizer.json, run by the `tokenizers` package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.text.tokenizers import MASKS, Texts, Tokenizer, check_ids

FILE = "tokenizer.json"


def characters_of_bytes() -> dict[str, int]:
    """The printable character for each byte in GPT-2's files. Radford et al. 2019, public code."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = characters_of_bytes()
CHARACTERS = {byte: character for character, byte in BYTES.items()}


def steps_of(described: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A single described step, or a sequence of them, as a list."""
    if not described:
        return []
    steps: list[dict[str, Any]] = described[parts] if described.get("type") == "Sequence" else [described]
    return steps


def piece_of(token: str, decoders: Sequence[dict[str, Any]]) -> bytes:
    """The bytes of a token inside a text, by the decoders of a tokenizer.json."""
    for decoder in decoders:
        match decoder["type"]:
            case "ByteLevel" if all(character in BYTES for character in token):
                return bytes(BYTES[character] for character in token)
            case "ByteFallback" if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            case "WordPiece" if token.startswith(decoder["prefix"]):
                token = token.removeprefix(decoder["prefix"])
            case "WordPiece":
                token = " " + token
            case "Metaspace":
                token = token.replace(decoder["replacement"], " ")
            case "BPEDecoder":
                token = token.replace(decoder["suffix"], " ")
            case "Replace" if "String" in decoder["pattern"]:
                token = token.replace(decoder["pattern"]["String"], decoder["content"])
    return token.encode()


class PublicTokenizer(Tokenizer, name="tokenizers"):
    """A tokenizer from a tokenizer.json (WordPiece, unigram, …), run by the `tokenizers` package.

    Text is encoded without the special tokens around it, which are in `framing`.
    """

    def __init__(self, content: dict[str, Any], end_of_text: int, special_tokens: Iterable[str] = ()) -> None:
        try:
            from tokenizers import Tokenizer as Implementation
        except ImportError:
            raise UserError("this tokenizer needs the tokenizers package: pip install minitransformer[hub]") from None
        self.content, self.end_of_text = content, end_of_text
        try:
            self._implementation = Implementation.from_str(json.dumps(content))
        except Exception as error:  # the package raises plain Exceptions
            raise UserError(f"the tokenizers package cannot run {FILE} ({error}): download it again") from None
        # Disable truncation, padding and special tokens spelled out in the text.
        self._implementation.no_truncation()
        self._implementation.no_padding()
        self._implementation.encode_special_tokens = True
        self._implementation.add_special_tokens([self._implementation.id_to_token(end_of_text)])
        known = self._special_tokens()
        self._implementation.add_special_tokens([name for name in special_tokens if name not in known])
        self.special_tokens = self._special_tokens()
        self.mask_pattern = self._mask_pattern()
        ids = self._implementation.get_vocab(with_added_tokens=True)
        self.vocab_size = check_ids(max(ids.values())) + 1
        self.pieces = [b""] * self.vocab_size
        decoders = steps_of(content.get("decoder"), "decoders")
        for token, number in ids.items():
            if token not in self.special_tokens:
                self.pieces[number] = piece_of(token, decoders)

    def _special_tokens(self) -> dict[str, int]:
        added = self._implementation.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def _mask_pattern(self) -> re.Pattern[str]:
        """Masks with adjacent spaces, if the file says that they include them."""
        added = self._implementation.get_added_tokens_decoder().values()
        masks = [token for token in added if token.content in MASKS]
        before = r"\s*" if any(token.lstrip for token in masks) else ""
        after = r"\s*" if any(token.rstrip for token in masks) else ""
        return re.compile(f"{before}(?:{Tokenizer.mask_pattern.pattern}){after}")

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        raise UserError("a public tokenizer cannot be trained here: choose bpe, bytes or chars")

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.array(self._implementation.encode(text, add_special_tokens=False).ids, np.uint32)
        except (TypeError, UnicodeEncodeError):
            raise UserError(
                f"{text[:40]!r} holds half a surrogate pair, which UTF-8 cannot encode: give valid UTF-8"
            ) from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        text: str = self._implementation.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def to_json(self) -> dict[str, Any]:
        return self._described(content=self.content, end_of_text=self.end_of_text)

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(content["content"], content["end_of_text"], content["special_tokens"])
