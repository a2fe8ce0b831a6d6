"""Tokenizers of public checkpoints: byte-level BPE by tiktoken, all others by the `tokenizers` package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.pretrained.marian import TARGET, SentencePiece, marian_tokenizer
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.pretrained.unigram_files import content_of_unigram
from minitransformer.pretrained.vocabularies import as_its_class_reads_it, content_of_vocabulary
from minitransformer.text.tokenizers import (
    BPE,
    END_OF_TEXT,
    GPT2_SPLIT,
    GPT4_SPLIT,
    MASKS,
    Framing,
    Texts,
    Tokenizer,
    check_ids,
)
from minitransformer.text.tokenizers.native import call_native, call_within_time

T = TypeVar("T")

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Special tokens in older checkpoints.
NAMES = "special_tokens_map.json"
# What a model expects of texts: the second file takes precedence; older checkpoints lack it.
CONFIGS = ("config.json", "generation_config.json")
# The same patterns as written in files, where {1,3}+ is a repetition.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": GPT4_SPLIT
}
# Published normalizers and decoders replace a character by one or two.
MOST_GROWTH = 100
# Names of end-of-text tokens in different families.
ENDS = ("</s>", END_OF_TEXT, "<|end_of_text|>", "[SEP]")


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


def check_growth(content: dict[str, Any]) -> None:
    """Raises `UserError` if a tokenizer.json replaces text by far longer text, which would fill the memory."""
    growth = 1.0
    parts: list[Any] = [content.get("normalizer"), content.get("decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and part.get("type") == "Replace" and isinstance(part.get("content"), str):
            replaced = part["pattern"].get("String") or "x"
            growth *= max(1.0, len(part["content"]) / len(replaced))
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    if growth > MOST_GROWTH:
        raise UserError(f"{FILE} replaces text by {growth:.0e} times as much: use another tokenizer")


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
        described = json.dumps(content)
        self._may_backtrack = '"Regex"' in described
        check_growth(content)
        try:
            self._implementation = call_native(lambda: Implementation.from_str(described))
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
        # From the first of several spaces only: trying each of them would be quadratic.
        before = r"(?<!\s)\s*" if any(token.lstrip for token in masks) else ""
        after = r"\s*" if any(token.rstrip for token in masks) else ""
        return re.compile(f"{before}(?:{Tokenizer.mask_pattern.pattern}){after}")

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        raise UserError("a public tokenizer cannot be trained here: choose bpe, bytes or chars")

    def _call(self, call: Callable[[], T], size: int) -> T:
        return call_within_time(call, size) if self._may_backtrack else call_native(call)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        def encode() -> npt.NDArray[np.uint32]:
            # Unlike `encode`, it releases the GIL.
            [encoding] = self._implementation.encode_batch([text], add_special_tokens=False)
            return np.array(encoding.ids, np.uint32)

        try:
            return self._call(encode, len(text))
        except (TypeError, UnicodeEncodeError):
            raise UserError(
                f"{text[:40]!r} holds half a surrogate pair, which UTF-8 cannot encode: give valid UTF-8"
            ) from None
        except ValueError as error:
            raise UserError(f"the tokenizer cannot split this text ({error}): use another one") from None

    @cached_property
    def _spelling_implementation(self) -> Any:
        """A second one, to which special tokens in a text are tokens: threads may share the first."""
        implementation = type(self._implementation).from_str(self._implementation.to_str())
        implementation.encode_special_tokens = False
        return implementation

    def encode_spelled(self, text: str) -> tuple[list[int], list[int]]:
        """As its own library does: what is before a piece may change how the piece begins."""
        try:
            encoding = self._call(
                lambda: self._spelling_implementation.encode_batch([text], add_special_tokens=False)[0], len(text)
            )
        except ValueError as error:
            raise UserError(f"the tokenizer cannot split this text ({error}): use another one") from None
        return list(encoding.ids), [begin for begin, _ in encoding.offsets]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        tokens = list(ids)

        def decode() -> str:
            [text] = self._implementation.decode_batch([tokens], skip_special_tokens=skip_special)
            return str(text)

        try:
            return self._call(decode, len(tokens))
        except ValueError as error:
            raise UserError(f"the tokenizer cannot decode these tokens ({error}): use another one") from None

    def to_json(self) -> dict[str, Any]:
        return self._described(content=self.content, end_of_text=self.end_of_text)

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        return cls(content["content"], content["end_of_text"], content["special_tokens"])


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None without a tokenizer.json or known older files."""
    settings, expected = (merged_fields(folder, names) for names in ((NAMES, SETTINGS), CONFIGS))
    try:
        content = tokenizer_content(folder, settings, expected.get("model_type", ""))
        if content is not None:
            tokenizer, around = _tokenizer_of(content, settings, expected), template(content.get("post_processor"))
        elif expected.get("model_type") == "marian" and (marian := marian_tokenizer(folder, settings)):
            tokenizer, around = marian, ((), (marian.end_of_text,))
        else:
            return None
        return tokenizer.framed(framing_of(around, expected, tokenizer))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FILE} is damaged ({error!r}): download it again") from None


def load_target_tokenizer(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of targets in a checkpoint folder with that of its sources; `tokenizer` if one serves both."""
    if not isinstance(tokenizer, SentencePiece):
        return tokenizer
    target = marian_tokenizer(folder, merged_fields(folder, (NAMES, SETTINGS)), TARGET)
    assert target is not None
    return tokenizer if target.model == tokenizer.model else target.framed(tokenizer.framing)


def merged_fields(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The non-null fields of all existing files; later files take precedence."""
    contents = [read_checkpoint_json(folder / name) for name in names if (folder / name).is_file()]
    return {field: value for content in contents for field, value in content.items() if value is not None}


def content_of_folder(folder: Path) -> dict[str, Any] | None:
    """The content of the tokenizer.json of a checkpoint folder, as its class reads it; None without known files."""
    settings, expected = (merged_fields(folder, names) for names in ((NAMES, SETTINGS), CONFIGS))
    return tokenizer_content(folder, settings, expected.get("model_type", ""))


def tokenizer_content(folder: Path, settings: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    if not (folder / FILE).is_file():
        older = content_of_vocabulary(folder, settings, model_type)
        return older or content_of_unigram(folder, settings, model_type)
    return as_its_class_reads_it(read_checkpoint_json(folder / FILE), settings, model_type)


def framing_of(
    around: tuple[tuple[int, ...], tuple[int, ...]], expected: dict[str, Any], tokenizer: Tokenizer
) -> Framing:
    """The framing of texts by the ids before and after them, and of targets from the configurations."""
    before, after = around
    two_sided = expected.get("is_encoder_decoder")
    start = expected.get("decoder_start_token_id", expected.get("bos_token_id")) if two_sided else None
    # A configuration not adapted to a smaller vocabulary may have ids outside it.
    others = [end for end in _ids(expected.get("eos_token_id")) if end < tokenizer.vocab_size]
    banned = [tokens[0] for tokens in expected.get("bad_words_ids", []) if len(tokens) == 1]
    return Framing(
        before,
        after,
        start=None if start == tokenizer.end_of_text else start,
        forced_bos=expected.get("forced_bos_token_id") if two_sided else None,
        forced_eos=next(iter(_ids(expected.get("forced_eos_token_id"))), None) if two_sided else None,
        other_ends=tuple(end for end in dict.fromkeys(others) if end != tokenizer.end_of_text),
        suppressed=tuple(banned),
    )


def _ids(value: int | list[int] | None) -> list[int]:
    """The ids in a configuration: one, several or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def template(described: dict[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor adds before and after a single text."""
    for step in steps_of(described, "processors"):
        match step["type"]:
            case "BertProcessing" | "RobertaProcessing":
                return (step["cls"][1],), (step["sep"][1],)
            case "TemplateProcessing":
                sides: list[list[int]] = [[]]
                for piece in step["single"]:
                    if "Sequence" in piece:
                        sides.append([])
                    else:
                        sides[-1] += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
                before, after = sides
                return tuple(before), tuple(after)
    return (), ()


def _tokenizer_of(content: dict[str, Any], settings: dict[str, Any], expected: dict[str, Any]) -> Tokenizer:
    end, ranks, pattern = _end_of_text(content, settings, expected), byte_level_ranks(content), split_pattern(content)
    # Added tokens that are not special match in any text, before it is split.
    found_in_text = [token for token in content.get("added_tokens", []) if not token.get("special")]
    if ranks is None or pattern is None or end < len(ranks) or found_in_text:
        return PublicTokenizer(content, end_of_text=end)
    special = {name: number for name, number in _added(content).items() if number >= len(ranks) and number != end}
    try:
        return BPE(ranks, pattern=pattern, special_tokens={**special, END_OF_TEXT: end})
    except ValueError:  # tiktoken drops what the pattern leaves out
        return PublicTokenizer(content, end_of_text=end)


def _added(content: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def _end_of_text(content: dict[str, Any], settings: dict[str, Any], expected: dict[str, Any]) -> int:
    """The end-of-text id: from the settings, the model's configuration, or by its usual names."""
    vocabulary = content["model"].get("vocab")
    ids: dict[str, int] = {**(vocabulary if isinstance(vocabulary, dict) else {}), **_added(content)}
    named = settings.get("eos_token", "")
    known = set(ids.values())
    candidates = [
        ids.get(named["content"] if isinstance(named, dict) else named),
        *(end for end in _ids(expected.get("eos_token_id")) if end in known),
        *map(ids.get, ENDS),
    ]
    for number in candidates:
        if number is not None:
            return number
    raise UserError(f"{FILE} has no end-of-text token: give its eos_token in {SETTINGS}")


def byte_level_ranks(content: dict[str, Any]) -> list[bytes] | None:
    """The tokens in order of ids, if this is byte-level BPE with ids in merge order."""
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    added = _added(content)
    vocab = {token: number for token, number in model["vocab"].items() if token not in added}
    if sorted(vocab.values()) != list(range(len(vocab))) or any(c not in BYTES for token in vocab for c in token):
        return None
    ranks = [bytes(BYTES[c] for c in token) for token in sorted(vocab, key=vocab.__getitem__)]
    return ranks if {bytes([byte]) for byte in range(256)} <= set(ranks) and _in_order(model, vocab) else None


def _in_order(model: dict[str, Any], vocab: dict[str, int]) -> bool:
    """Whether merges produce all tokens in the order of their ids, as tiktoken assumes.

    Tokens without a merge are matched as whole words, if the file says so.
    """
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocab.get(first + second, -1) for first, second in pairs]
    longer = {number for token, number in vocab.items() if len(token) > 1}
    return -1 not in made and made == sorted(made) and (model.get("ignore_merges", False) or longer == set(made))


def split_pattern(content: dict[str, Any]) -> str | None:
    """The regular expression that splits text before merging, if there is no other pre-processing."""
    if content.get("normalizer") is not None:
        return None
    steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and not steps[0].get("add_prefix_space") and steps[0].get("use_regex", True):
        return GPT2_SPLIT
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True) or steps[1].get("add_prefix_space"):
        return None
    pattern = steps[0]["pattern"].get("Regex")
    isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
    return SPLITS.get(pattern, pattern) if isolated else None
