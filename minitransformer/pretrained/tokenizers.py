"""Tokenizers of public checkpoints: byte-level BPE through tiktoken, every other kind by the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.text.tokenizers import BPE, END_OF_TEXT, Texts, Tokenizer

FILE = "tokenizer.json"
# How GPT-2 splits text before merging: what a ByteLevel pre-tokenizer does without being told.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None if it has no tokenizer.json."""
    if not (folder / FILE).is_file():
        return None
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    settings = _json_or_empty(folder / "tokenizer_config.json") | _json_or_empty(folder / "config.json")
    ranks, pattern = byte_level_ranks(content), split_pattern(content)
    if ranks is None or pattern is None:
        return PublicTokenizer(json.dumps(content), end_of_text=_end_of_text(content, settings))
    special = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    special = {name: number for name, number in special.items() if number >= len(ranks)}
    end = _end_of_text(content, settings)
    special = {name: number for name, number in special.items() if number != end}
    return BPE(ranks, pattern=pattern, special_tokens={**special, END_OF_TEXT: end})


def _json_or_empty(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _end_of_text(content: dict[str, Any], settings: dict[str, Any]) -> int:
    """The id that ends a text: what the settings say, or a token that is usually called so."""
    ids = {**content["model"].get("vocab", {})} if isinstance(content["model"].get("vocab"), dict) else {}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    named = settings.get("eos_token")
    named = named["content"] if isinstance(named, dict) else named
    for name in (named, "</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"):
        if name in ids:
            return ids[name]
    raise UserError(f"{FILE} names no token that ends a text: give its eos_token in tokenizer_config.json")


def characters_of_bytes() -> dict[str, int]:
    """The printable character by which GPT-2's files write each byte. Radford et al. 2019, their public code."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def byte_level_ranks(content: dict[str, Any]) -> list[bytes] | None:
    """The tokens in the order of their ids, if this is byte-level BPE whose ids are the order of merging."""
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    bytes_of = characters_of_bytes()
    added = {token["content"] for token in content.get("added_tokens", [])}
    vocab = {token: number for token, number in model["vocab"].items() if token not in added}
    if sorted(vocab.values()) != list(range(len(vocab))) or any(c not in bytes_of for token in vocab for c in token):
        return None
    ranks = [bytes(bytes_of[c] for c in token) for token in sorted(vocab, key=vocab.__getitem__)]
    return ranks if {bytes([byte]) for byte in range(256)} <= set(ranks) and _in_order(model, vocab) else None


def _in_order(model: dict[str, Any], vocab: dict[str, int]) -> bool:
    """Whether merges make their tokens in the order of the tokens' ids, as tiktoken takes for granted."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocab.get(first + second, -1) for first, second in pairs]
    return -1 not in made and made == sorted(made)


def split_pattern(content: dict[str, Any]) -> str | None:
    """The regular expression that splits text before merging, if that is all that happens to it."""
    if content.get("normalizer") is not None:
        return None
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and not steps[0].get("add_prefix_space") and steps[0].get("use_regex", True):
        return GPT2_SPLIT
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and "Regex" in steps[0]["pattern"]:
        return str(steps[0]["pattern"]["Regex"])
    return None


class PublicTokenizer(Tokenizer, name="tokenizers"):
    """Whatever a tokenizer.json describes (WordPiece, unigram, …), run by the `tokenizers` package.

    Text is encoded without the special tokens that a model may want around it.
    """

    def __init__(self, content: str, end_of_text: int) -> None:
        try:
            from tokenizers import Tokenizer as Implementation
        except ImportError:
            raise UserError("this tokenizer takes the tokenizers package: pip install minitransformer[hub]") from None
        self.content, self.end_of_text = content, end_of_text
        self._implementation = Implementation.from_str(content)
        self.vocab_size = self._implementation.get_vocab_size(with_added_tokens=True)
        self.special_tokens = {
            token.content: number for number, token in self._implementation.get_added_tokens_decoder().items()
        }
        self.pieces = []

    @classmethod
    def fit(cls, texts: Texts, vocab_size: int | None = None) -> Self:
        raise UserError("a tokenizer of a public checkpoint comes with it: choose bpe, bytes or chars to fit one")

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        return np.array(self._implementation.encode(text, add_special_tokens=False).ids, np.uint32)

    def token_bytes(self, token: int) -> bytes:
        return self.decode([token]).encode()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        text: str = self._implementation.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def to_json(self) -> dict[str, Any]:
        return self._described(content=self.content, end_of_text=self.end_of_text)

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(content["content"], content["end_of_text"])
