"""Text to token ids and back: trained byte-level BPE, raw bytes, characters, and tiktoken's published encodings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.files import whole_file
from minitransformer.records import read_json, shown
from minitransformer.registry import Registered

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
# What public tokenizers call it.
MASKS = (MASK, "[MASK]", "<mask>")
FORMAT = 1
CODE_POINTS = 0x110000
# A bit of everything that a pattern has to keep when it splits a text.
ALL_KINDS = "It's  two WORDS,\tnaïve 東京 12345 x1\r\n\n 🦊 _-=+ \x07 \u00a0\u2028e\u0301 '"
# Several times what the largest published vocabulary has; each takes memory, used or not.
MOST_TOKENS = 1 << 22
# How GPT-4 (cl100k) splits text before merging, in tiktoken's spelling, which cannot backtrack into a stack overflow.
GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

Texts = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Framing:
    """The ids that a model expects beside those of its texts; the defaults stand for what our own training does.

    Raises `TypeError` for what are no ids.
    """

    before: tuple[int, ...] = ()
    """stand before every text that is read"""
    after: tuple[int, ...] = ()
    """stand after every text that is read whole, and after every target"""
    start: int | None = None
    """what a decoder reads before the first token of a target; None is the end of text"""
    first: int | None = None
    """with which every target begins, whatever the model finds likely"""
    last: int | None = None
    """with which a target ends that would grow too long"""
    other_ends: tuple[int, ...] = ()
    """end a text as well as the end of text does"""
    never: tuple[int, ...] = ()
    """are never written"""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            ids = value if isinstance(field.default, tuple) else () if value is None else (value,)
            if not isinstance(ids, tuple | list) or not all(type(token) is int and token >= 0 for token in ids):
                raise TypeError(f"{field.name} is {value!r}, which are no token ids")
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, tuple(ids))  # JSON has lists only

    @property
    def length(self) -> int:
        """How many tokens stand around a text."""
        return len(self.before) + len(self.after)

    def around(self, tokens: Iterable[int]) -> list[int]:
        """`tokens` with what stands before and after them."""
        return [*self.before, *tokens, *self.after]


def check_ids(largest: int) -> int:
    """`largest`, the largest id of a vocabulary; raises `UserError` where it would only cost memory."""
    if largest >= MOST_TOKENS:
        raise UserError(f"token id {largest} is larger than any vocabulary: ids are below {MOST_TOKENS:,}")
    return largest


class Tokenizer(Registered, kind="tokenizer"):
    """Text to ids in [0, vocab_size) and back; a member says what its ordinary ids stand for.

    `pieces[i]` are the bytes that id i stands for; special tokens and the gaps of published
    vocabularies stand for none. What a text contains is always ordinary: a special token spelled out
    in it stays text, so no text can end a document by saying so.
    """

    fit_limit: ClassVar[int | None] = None
    """How many bytes of text `fit` wants at most; None for all there is."""
    usual_vocab_size: ClassVar[int] = 4096
    """How many tokens `fit` finds, or about how many, before there is a text: the size of a model is said by it."""
    mask_pattern: re.Pattern[str] = re.compile("|".join(map(re.escape, MASKS)))
    """How a mask is written in a text, with the spaces that it stands for too."""
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
    @abstractmethod
    def fit(cls, texts: Texts, vocab_size: int | None = None) -> Self:
        """A tokenizer for `texts()`; `vocab_size` counts the special tokens, None takes the member's own.

        Raises `UserError` when `vocab_size` is too small for this tokenizer.
        """

    @abstractmethod
    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of `text`, shape [tokens]; raises `UserError` for characters that cannot be encoded."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that is needed to encode and decode, without network, cache or pickle."""

    @classmethod
    @abstractmethod
    def _from_json(cls, content: dict[str, Any]) -> Self: ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """What a decoder continues: `text` after the tokens that stand before one, or a beginning if there are none."""
        return [*self.framing.before, *self.encode(text)] or [self.end_of_text]

    @property
    def masked_framing(self) -> Framing:
        """What stands around texts with masks: at least a first token, from which classes are told."""
        return replace(self.framing, before=self.framing.before or (self.end_of_text,))

    @property
    def pair_framing(self) -> Framing:
        """What stands around sources and targets: at least their end."""
        return replace(self.framing, after=self.framing.after or (self.end_of_text,))

    @property
    def separator(self) -> list[int]:
        """What stands before each document of a text: the end of the one before, and the beginning of this one."""
        end = [self.end_of_text]
        return end if self.framing.before == tuple(end) else [*end, *self.framing.before]

    @property
    def target_start(self) -> int:
        """What a decoder reads before the first token of a target."""
        return self.end_of_text if self.framing.start is None else self.framing.start

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of which each ends a text."""
        return (self.end_of_text, *self.framing.other_ends)

    def framed(self, framing: Framing) -> Self:
        """This tokenizer for a model that expects `framing`; raises `UserError` for ids that it has not."""
        used = [*framing.before, *framing.after, *framing.other_ends, *framing.never]
        used += [token for token in (framing.start, framing.first, framing.last) if token is not None]
        if used and max(used) >= self.vocab_size:
            raise UserError(
                f"texts are to be framed by token {max(used)}, and the tokenizer has {self.vocab_size}: "
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
        """The tokenizer that `to_json` described; raises `UserError` when `content` describes none."""
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            tokenizer = Tokenizer.named(content["type"])._from_json(content)
            return tokenizer.framed(Framing(**content["framing"])) if "framing" in content else tokenizer
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"not a tokenizer: {what}; use a tokenizer.json as training wrote it") from None

    @property
    def mask(self) -> int:
        """The id that stands for a hidden token; raises `UserError` if there is none."""
        for name in MASKS:
            if name in self.special_tokens:
                return self.special_tokens[name]
        raise UserError(f"the {self.name} tokenizer has no token for a mask: use one that masked training made")

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with more special tokens, after all others; those that it has already are left alone."""
        has_mask = any(name in self.special_tokens for name in MASKS)
        missing = [name for name in names if name not in self.special_tokens and not (name == MASK and has_mask)]
        if not missing:
            return self
        more = {name: self.vocab_size + i for i, name in enumerate(missing)}
        return Tokenizer.from_json({**self.to_json(), "special_tokens": {**self.special_tokens, **more}})

    def save(self, path: Path | str) -> None:
        """Writes `to_json` to `path`, whole or not at all."""
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
        """sha256 of the canonical JSON: equal for tokenizers that encode alike."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def check_vocab_size(self, wanted: int | None) -> Self:
        """Itself; raises `UserError` when a model of `wanted` ids could not hold this vocabulary."""
        if wanted is not None and wanted < self.vocab_size:
            raise UserError(
                f"vocabulary too small: vocab_size is {wanted}, but the {self.name} tokenizer has {self.vocab_size} "
                f"tokens: set vocab_size to {self.vocab_size} or more, or leave it out"
            )
        return self

    def _described(self, **content: Any) -> dict[str, Any]:
        framing = {} if self.framing == Framing() else {"framing": asdict(self.framing)}
        return {"format": FORMAT, "type": self.name, "special_tokens": self.special_tokens, **framing, **content}


def _not_text(error: UnicodeEncodeError) -> UserError:
    lone = error.object[error.start]
    return UserError(
        f"character {lone!r} (U+{ord(lone):04X}) is half a surrogate pair, which UTF-8 has not: give valid UTF-8"
    )


class Bytes(Tokenizer, name="bytes"):
    """The 256 values of a UTF-8 byte. Xue et al. 2022, ByT5 (arXiv 2105.13626)."""

    usual_vocab_size = 257

    def __init__(self, special_tokens: dict[str, int] | None = None) -> None:
        super().__init__([bytes([value]) for value in range(256)], special_tokens)

    @classmethod
    def fit(cls, texts: Texts, vocab_size: int | None = None) -> Self:
        return cls().check_vocab_size(vocab_size)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        except UnicodeEncodeError as error:
            raise _not_text(error) from None

    def to_json(self) -> dict[str, Any]:
        return self._described()

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(_special_tokens(content))


class Characters(Tokenizer, name="chars"):
    """One id for each character of the training text, in code point order."""

    usual_vocab_size = 66  # Tiny Shakespeare's

    def __init__(self, characters: str, special_tokens: dict[str, int] | None = None) -> None:
        if sorted(set(characters)) != list(characters):
            raise ValueError("characters must be sorted and distinct")
        super().__init__([character.encode() for character in characters], special_tokens)
        self.characters = characters
        points = self._points(characters)
        self._unknown = len(points)
        # One row more than the highest code point: every higher one is looked up there, and is unknown.
        self._ids = np.full(int(points.max(initial=0)) + 2, self._unknown, np.uint32)
        self._ids[points] = np.arange(len(points))

    @classmethod
    def fit(cls, texts: Texts, vocab_size: int | None = None) -> Self:
        seen = np.zeros(CODE_POINTS, bool)
        for text in texts():
            seen[cls._points(text)] = True
        return cls("".join(map(chr, np.flatnonzero(seen)))).check_vocab_size(vocab_size)

    @staticmethod
    def _points(text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.frombuffer(text.encode("utf-32-le"), "<u4")
        except UnicodeEncodeError as error:
            raise _not_text(error) from None

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        points = self._points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids == self._unknown)
        if unknown.size:
            stranger = text[unknown[0]]
            raise UserError(
                f"character {stranger!r} (U+{ord(stranger):04X}) is not among the {len(self.characters)} of this chars "
                "tokenizer: leave it out, or train with the bpe or bytes tokenizer, which encode every text"
            )
        return ids

    def to_json(self) -> dict[str, Any]:
        return self._described(characters=self.characters)

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(_typed(content, "characters", str), _special_tokens(content))


class BPE(Tokenizer, name="bpe"):
    """Byte-level byte-pair encoding over GPT-4's split, trained by rustbpe and run by tiktoken.

    `ranks` are the tokens in the order of their merging; a token's id is its place in it.
    Sennrich et al. 2016 (arXiv 1508.07909); on bytes: Radford et al. 2019 (GPT-2), section 2.2.
    """

    default_vocab_size: ClassVar[int] = 4096
    # rustbpe keeps every distinct word; more text than this changes few merges and costs memory.
    fit_limit = 32 << 20

    def __init__(
        self, ranks: Sequence[bytes], *, pattern: str = GPT4_SPLIT, special_tokens: dict[str, int] | None = None
    ) -> None:
        import tiktoken

        if len(set(ranks)) < len(ranks) or not {bytes([value]) for value in range(256)} <= set(ranks):
            raise ValueError("ranks must be distinct and hold all 256 single bytes")
        super().__init__(ranks, special_tokens)
        self.ranks, self.pattern = list(ranks), pattern
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=self.special_tokens,
        )
        if self.decode_bytes(self._encoded(ALL_KINDS).tolist()) != ALL_KINDS.encode():
            raise ValueError(f"pattern {shown(pattern)} leaves out parts of a text")

    def _encoded(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of `text`; raises `ValueError` where the pattern fails, and for text that UTF-8 has not."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # a panic in Rust is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"pattern {shown(self.pattern)} fails ({error})") from None

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int) -> Self:
        """Merges the most frequent pairs of `texts` until there are `vocab_size` tokens, or no pair is left.

        A single text is one document. Raises `UserError` when `vocab_size` cannot hold the 256 bytes and the special
        tokens, and for a text that UTF-8 cannot spell.
        """
        import rustbpe

        minimum = 256 + 1
        if vocab_size < minimum:
            raise UserError(
                f"vocabulary too small: vocab_size is {vocab_size}, but bpe needs {minimum} or more "
                "(256 bytes and the end-of-text token): set vocab_size higher"
            )
        trainer = rustbpe.Tokenizer()
        # A small buffer: rustbpe holds this many texts at once, and ours may be long.
        documents = iter([texts] if isinstance(texts, str) else texts)
        try:
            trainer.train_from_iterator(documents, vocab_size=vocab_size - 1, buffer_size=64, pattern=GPT4_SPLIT)
        except UnicodeEncodeError as error:
            raise _not_text(error) from None
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
        return cls([bytes(token) for token, _ in ranks])

    @classmethod
    def fit(cls, texts: Texts, vocab_size: int | None = None) -> Self:
        return cls.train(texts(), cls.default_vocab_size if vocab_size is None else vocab_size)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._encoded(text)
        except UnicodeEncodeError as error:
            raise _not_text(error) from None
        except ValueError as error:
            raise UserError(f"the tokenizer cannot split this text ({error}): use another one") from None

    def to_json(self) -> dict[str, Any]:
        # Latin-1 maps byte b to code point b: lossless, and a reader recognises the words.
        return self._described(pattern=self.pattern, ranks=[token.decode("latin-1") for token in self.ranks])

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        ranks = [token.encode("latin-1") for token in _typed(content, "ranks", list)]
        return cls(ranks, pattern=_typed(content, "pattern", str), special_tokens=_special_tokens(content))


class Published(BPE):
    """An encoding that tiktoken publishes; a saved one carries its ranks and needs no network."""

    default_vocab_size = 0
    fit_limit = 0
    host: ClassVar[str] = "https://openaipublic.blob.core.windows.net/"
    files: ClassVar[tuple[str, ...]]

    @classmethod
    def fit(cls, texts: Texts, vocab_size: int | None = None) -> Self:
        import tiktoken

        cls._fetch()
        try:
            encoding = tiktoken.get_encoding(cls.name)
        except Exception as error:  # tiktoken raises what requests, the file system and its own checks raise
            raise cls._unavailable(error) from None
        ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.__getitem__)
        special_tokens = dict(encoding._special_tokens)
        return cls(ranks, pattern=encoding._pat_str, special_tokens=special_tokens).check_vocab_size(vocab_size)

    @classmethod
    def _cached(cls) -> dict[str, Path]:
        """Where tiktoken looks for each file: under the sha1 of its address."""
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        cache = Path(folder or Path(tempfile.gettempdir(), "data-gym-cache"))
        addresses = [cls.host + file for file in cls.files]
        return {address: cache / hashlib.sha1(address.encode()).hexdigest() for address in addresses}

    @classmethod
    def _fetch(cls) -> None:
        """Fills tiktoken's cache ourselves, because its own download has no time limit."""
        from urllib.request import urlopen

        for address, path in cls._cached().items():
            if path.exists():
                continue
            try:
                with urlopen(address, timeout=20) as answer:
                    content = answer.read()
                with whole_file(path) as file:
                    file.write(content)
            except OSError as error:
                raise cls._unavailable(error) from None

    @classmethod
    def _unavailable(cls, error: Exception) -> UserError:
        files = " and ".join(f"{address} as {path.name}" for address, path in cls._cached().items())
        reason = str(error) or type(error).__name__
        return UserError(
            f"the {cls.name} encoding cannot be fetched ({reason}): on a connected machine download {files}, put it "
            "into a folder here and set TIKTOKEN_CACHE_DIR to that folder; or choose the bpe, bytes or chars tokenizer"
        )


class GPT2(Published, name="gpt2"):
    """GPT-2's 50,257 tokens; r50k_base is the same."""

    usual_vocab_size = 50_257
    files = ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json")


class CL100K(Published, name="cl100k_base"):
    """GPT-4's 100,277 ids."""

    usual_vocab_size = 100_277
    files = ("encodings/cl100k_base.tiktoken",)


class O200K(Published, name="o200k_base"):
    """GPT-4o's 200,019 ids."""

    usual_vocab_size = 200_019
    files = ("encodings/o200k_base.tiktoken",)


def _typed(content: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(content[key], kind):
        raise TypeError(f"{key!r} is not a {kind.__name__}")
    return content[key]


def _special_tokens(content: dict[str, Any]) -> dict[str, int]:
    special = _typed(content, "special_tokens", dict)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in special.values()):
        raise TypeError("a special token's id is not an integer")
    return dict(special)
