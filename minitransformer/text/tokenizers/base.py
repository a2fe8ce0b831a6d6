"""The interface of tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import whole_file
from minitransformer.records import read_json
from minitransformer.registry import Registered
from minitransformer.text.tokenizers.framing import Framing

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
# The name in public tokenizers.
MASKS = (MASK, "[MASK]", "<mask>")
FORMAT = 1
# Several times the largest published vocabulary; each id takes memory, used or not.
MOST_TOKENS = 1 << 22

Texts = Callable[[], Iterator[str]]


def check_ids(largest: int) -> int:
    """`largest`, the largest id of a vocabulary; raises `UserError` if it is implausible."""
    if largest >= MOST_TOKENS:
        raise UserError(f"token id {largest} is larger than any vocabulary: ids are below {MOST_TOKENS:,}")
    return largest


class Tokenizer(Registered, kind="tokenizer"):
    """Converts text to ids in [0, vocab_size) and back.

    `pieces[i]` are the bytes of id i, empty for special tokens and gaps of published vocabularies. Special tokens
    spelled out in a text are encoded as ordinary text, so that no text can end a document. `fit` makes a tokenizer
    from a member's `Settings`; a fitted one no longer needs them.
    """

    fit_limit: ClassVar[int | None] = None
    """maximum bytes of text for `fit`; None for no limit"""
    in_gguf: ClassVar[bool] = False
    """whether llama.cpp splits a text in the same way, so that a model can leave as a GGUF file"""
    mask_pattern: re.Pattern[str] = re.compile("|".join(map(re.escape, MASKS)))
    """pattern of a mask in a text, including the spaces that it replaces"""
    framing = Framing()

    def __init__(self, pieces: Sequence[bytes], special_tokens: dict[str, int] | None = None) -> None:
        self.special_tokens = {END_OF_TEXT: len(pieces)} if special_tokens is None else dict(special_tokens)
        ids = sorted(self.special_tokens.values())
        if END_OF_TEXT not in self.special_tokens or len(set(ids)) < len(ids) or ids[0] < len(pieces):
            raise UserError(
                f"special tokens {self.special_tokens} do not fit {len(pieces)} ordinary ones: "
                f"give {END_OF_TEXT} and every other its own id from {len(pieces)} on"
            )
        self.vocab_size: int = check_ids(ids[-1]) + 1
        self.end_of_text: int = self.special_tokens[END_OF_TEXT]
        self.pieces = [*pieces, *[b""] * (self.vocab_size - len(pieces))]

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        """A tokenizer fitted to `texts()`; `vocab_size`, special tokens included, is the model's, if it has one.

        Raises `UserError` when `vocab_size` is too small for this tokenizer.
        """
        raise NotImplementedError

    @classmethod
    def usual_vocab_size(cls, settings: Any) -> int:
        """The typical vocabulary size after `fit`, for the parameter counts in --help."""
        return 4096

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of `text`, shape [tokens]; raises `UserError` for characters that cannot be encoded."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Everything needed to encode and decode, without network, cache or pickle."""
        raise NotImplementedError

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`, without its framing."""
        raise NotImplementedError

    def shares_ids(self, other: Tokenizer) -> bool:
        """Whether the ids of both mean the same, so that sources and targets have one vocabulary."""
        return other is self

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_spelled(self, text: str) -> tuple[list[int], list[int]] | None:
        """The ids of `text`, in which special tokens spelled out are the tokens, and where each begins in it.

        None where what stands between special tokens may be encoded by itself, with the same result.
        """
        return None

    def encode_prompt(self, text: str) -> list[int]:
        """The prompt of a decoder: `text` after the framing prefix, or a beginning-of-text token if both are empty."""
        return [*self.framing.prefix, *self.encode(text)] or [self.end_of_text]

    @property
    def masked_framing(self) -> Framing:
        """The framing of masked texts: at least a first token, from which classes are predicted."""
        return replace(self.framing, prefix=self.framing.prefix or (self.end_of_text,))

    @property
    def label_framing(self) -> Framing:
        """The framing of texts to classify: at least a first and a last token, from which classes are predicted."""
        return replace(self.masked_framing, suffix=self.pair_framing.suffix)

    @property
    def pair_framing(self) -> Framing:
        """The framing of sources and targets: at least the end token."""
        return replace(self.framing, suffix=self.framing.suffix or (self.end_of_text,))

    @property
    def separator(self) -> list[int]:
        """The tokens between documents: the end of one and the prefix of the next."""
        end = [self.end_of_text]
        return end if self.framing.prefix == tuple(end) else [*end, *self.framing.prefix]

    @property
    def target_start(self) -> int:
        """The decoder start token of targets."""
        return self.end_of_text if self.framing.start is None else self.framing.start

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return (self.end_of_text, *self.framing.other_ends)

    def framed(self, framing: Framing) -> Self:
        """This tokenizer with `framing`; raises `UserError` for ids outside its vocabulary."""
        used = [*framing.prefix, *framing.suffix, *framing.other_ends, *framing.suppressed]
        used += [token for token in (framing.start, framing.forced_bos, framing.forced_eos) if token is not None]
        if used and max(used) >= self.vocab_size:
            raise UserError(
                f"the framing uses token {max(used)}, but the tokenizer has only {self.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        other = copy(self)
        other.__dict__.pop("fingerprint", None)
        other.framing = framing
        return other

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, for streaming; special tokens have none. Raises `ValueError` outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary: ids are 0 to {self.vocab_size - 1}")
        return self.pieces[token]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; special tokens contribute none."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, U+FFFD where bytes are not UTF-8; special tokens left out, or spelled if not skipped."""
        if skip_special:
            return self.decode_bytes(ids).decode(errors="replace")
        spelled = {token: spelling.encode() for spelling, token in self.special_tokens.items()}
        return b"".join(spelled.get(i) or self.token_bytes(i) for i in ids).decode(errors="replace")

    @staticmethod
    def from_json(content: Any) -> Tokenizer:
        """The inverse of `to_json`; raises `UserError` for invalid `content`."""
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            tokenizer = Tokenizer.named(content["type"])._from_json(content)
            return tokenizer.framed(Framing.from_json(content["framing"])) if "framing" in content else tokenizer
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"not a tokenizer: {what}; use a tokenizer.json as training wrote it") from None

    @property
    def mask(self) -> int:
        """The id of the mask token; raises `UserError` if there is none."""
        for name in MASKS:
            if name in self.special_tokens:
                return self.special_tokens[name]
        raise UserError(f"the {self.name} tokenizer has no mask token: use the tokenizer of a masked-language model")

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with additional special tokens after all others; existing ones are kept."""
        has_mask = any(name in self.special_tokens for name in MASKS)
        missing = [name for name in names if name not in self.special_tokens and not (name == MASK and has_mask)]
        if not missing:
            return self
        more = {name: self.vocab_size + i for i, name in enumerate(missing)}
        return Tokenizer.from_json({**self.to_json(), "special_tokens": {**self.special_tokens, **more}})

    def save(self, path: Path | str) -> None:
        """Write `to_json` to `path`, atomically."""
        with whole_file(Path(path)) as file:
            file.write(json.dumps(self.to_json(), indent=0).encode())

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """The tokenizer saved at `path`; raises `UserError` when there is none."""
        content = read_json(Path(path), "use a tokenizer.json as training wrote it")
        try:
            return Tokenizer.from_json(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal for equivalent tokenizers."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def check_vocab_size(self, wanted: int | None) -> Self:
        """Itself; raises `UserError` if it does not fit into a vocabulary of `wanted` ids."""
        if wanted is not None and wanted < self.vocab_size:
            raise UserError(
                f"vocabulary too small: vocab_size is {wanted}, but the {self.name} tokenizer has {self.vocab_size} "
                f"tokens: set vocab_size to {self.vocab_size} or more, or leave it out"
            )
        return self

    def _described(self, **content: Any) -> dict[str, Any]:
        framing = {} if self.framing == Framing() else {"framing": self.framing.to_json()}
        return {"format": FORMAT, "type": self.name, "special_tokens": self.special_tokens, **framing, **content}


def not_text(error: UnicodeEncodeError) -> UserError:
    lone = error.object[error.start]
    return UserError(
        f"character {lone!r} (U+{ord(lone):04X}) is half a surrogate pair, which UTF-8 cannot encode: give valid UTF-8"
    )


def typed_entry(content: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(content[key], kind):
        raise TypeError(f"{key!r} is not a {kind.__name__}")
    return content[key]


def special_tokens_in(content: dict[str, Any]) -> dict[str, int]:
    special = typed_entry(content, "special_tokens", dict)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in special.values()):
        raise TypeError("a special token's id is not an integer")
    return dict(special)
