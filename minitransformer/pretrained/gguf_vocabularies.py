"""Tokenizers in GGUF files: from the content of a tokenizer.json to metadata, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from minitransformer.errors import UserError
from minitransformer.pretrained.tokenizers import SPLITS, steps_of
from minitransformer.registry import Registered
from minitransformer.text.tokenizers import GPT2_SPLIT, GPT4_SPLIT

Metadata = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""types of tokens in a GGUF file"""
MODEL, PRE, TOKENS, TYPES = (f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type"))
MERGES, SCORES, TEMPLATE = "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.chat_template"
ADD_SPACE = "tokenizer.ggml.add_space_prefix"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT, DIGITS, PUNCTUATION = r"\p{N}", r"\p{N}+", r"[\p{P}\$\+<=>\^~\|`]+"
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# The pre-tokenizers that llama.cpp calls by a name, each with the patterns that split a text one after the other, as
# its checkpoints have them; it refuses others. Of several names for one, the first is written.
PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_SPLIT,),
    "olmo": (GPT2_SPLIT,),
    "llama-bpe": (GPT4_SPLIT,),
    "dbrx": (GPT4_SPLIT,),
    "smaug-bpe": (GPT4_SPLIT,),
    "qwen2": (QWEN2_SPLIT,),
    "stablelm2": (QWEN2_SPLIT,),
    "refact": (DIGIT, GPT2_SPLIT),
    "starcoder": (DIGIT, GPT2_SPLIT),
    "smollm": (DIGIT, GPT2_SPLIT),
    "command-r": (DIGIT, GPT2_SPLIT),
    "bloom": (BLOOM_SPLIT,),
    "falcon": (PUNCTUATION, GPT2_SPLIT, DIGITS, r"[0-9][0-9][0-9]"),
}
AS_IN_FILES = {ours: theirs for theirs, ours in SPLITS.items()}
WHOLE_WORDS = ("llama-bpe",)
"""those that take a word that is a token as it is"""
# llama.cpp needs a merge where a tokenizer has none: of two bytes that make no token.
NO_MERGE = "Ā Ā"
SPACE = "▁"


def token_key(name: str) -> str:
    """The key of a special token's id."""
    return f"tokenizer.ggml.{name}_token_id"


class GGUFVocabulary(Registered, kind="tokenizer of GGUF"):
    """How llama.cpp splits a text: registered by `tokenizer.ggml.model`."""

    before: ClassVar[dict[str, int]] = {}
    after: ClassVar[dict[str, int]] = {}
    """what stands before and after a text, and its usual id, where the file does not say so"""

    @classmethod
    def holds(cls, model: Mapping[str, Any]) -> bool:
        """Whether it splits like this model of a tokenizer.json."""
        raise NotImplementedError

    @classmethod
    def metadata(cls, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> Metadata:
        """The metadata for the content of a tokenizer.json, whose `tokens` and their `kinds` it may change.

        Raises `UserError` for what llama.cpp does not do.
        """
        raise NotImplementedError

    @classmethod
    def parts(cls, metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
        """The inverse of `metadata`: normalizer, pre-tokenizer, model and decoder."""
        raise NotImplementedError


class ByteLevelGGUF(GGUFVocabulary, name="gpt2"):
    """BPE of bytes."""

    @classmethod
    def holds(cls, model: Mapping[str, Any]) -> bool:
        return model.get("type") == "BPE" and not model.get("byte_fallback")

    @classmethod
    def metadata(cls, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> Metadata:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        return {PRE: _pre_tokenizer(content), MERGES: merges or [NO_MERGE]}

    @classmethod
    def parts(cls, metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
        return _byte_level_parts(metadata, vocab)


class SentencePieceGGUF(GGUFVocabulary, name="llama"):
    """SentencePiece's BPE: merges by score."""

    before: ClassVar[dict[str, int]] = {"bos": 1}

    @classmethod
    def holds(cls, model: Mapping[str, Any]) -> bool:
        return model.get("type") == "BPE" and bool(model.get("byte_fallback"))

    @classmethod
    def metadata(cls, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> Metadata:
        return _sentencepiece(content, tokens, kinds)

    @classmethod
    def parts(cls, metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
        return _sentencepiece_parts(metadata, vocab)


def gguf_vocabulary(content: dict[str, Any], size: int) -> Metadata:
    """The metadata for the content of a tokenizer.json, of `size` tokens; raises `UserError` if llama.cpp has none."""
    model = content["model"]
    kind = next((kind for kind in GGUFVocabulary.registry.values() if kind.holds(model)), None)
    if kind is None:
        raise UserError(
            f"llama.cpp has no tokenizer like {model.get('type')}: train a model with --tokenizer bpe, "
            "or choose --format hf"
        )
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    vocab = model["vocab"]
    numbered = vocab.items() if isinstance(vocab, dict) else [(token, i) for i, (token, _) in enumerate(vocab)]
    for token, number in numbered:
        tokens[number], kinds[number] = token, NORMAL
    for number, token in added.items():
        tokens[number], kinds[number] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    return {MODEL: kind.name, TOKENS: tokens, TYPES: kinds} | kind.metadata(content, tokens, kinds)


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """The name that llama.cpp has for how a text is split; raises `UserError` if it has none."""
    patterns = _patterns_of(content)
    if not content["model"]["merges"] and patterns is not None:  # single bytes, however they are split
        return "gpt-2"
    for name, known in PATTERNS.items():
        if patterns == known and bool(content["model"].get("ignore_merges")) >= (name in WHOLE_WORDS):
            return name
    raise UserError(
        f"llama.cpp has no name for how this tokenizer splits a text: known are {', '.join(PATTERNS)}; "
        "choose --format hf, or train a model with --tokenizer bpe"
    )


def _patterns_of(content: dict[str, Any]) -> tuple[str, ...] | None:
    """What splits a text, one after the other, before its bytes are merged; None for anything else."""
    found = []
    for step in steps_of(content.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                found += [GPT2_SPLIT] if step.get("use_regex", True) else []
            case {"type": "Digits"}:
                found.append(DIGIT if step.get("individual_digits") else DIGITS)
            case {"type": "Punctuation", "behavior": "Contiguous"}:
                found.append(PUNCTUATION)
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
                found.append(SPLITS.get(pattern, pattern))
            case _:
                return None
    return tuple(found) if content.get("normalizer") is None else None


def _sentencepiece(content: dict[str, Any], tokens: Sequence[str], kinds: list[int]) -> Metadata:
    """Merges by score, as SentencePiece has them: the score of a token is its place."""
    steps = steps_of(content.get("normalizer"), "normalizers") + steps_of(content.get("pre_tokenizer"), "pretokenizers")
    prepends = [
        step for step in steps if step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always")
    ]
    unknown = content["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            kinds[number] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = BYTE
    scores = [-float(number) for number in range(len(tokens))]
    return {PRE: "default", SCORES: scores, ADD_SPACE: bool(prepends)}


def tokenizer_of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json for the metadata; raises `UserError` for a tokenizer that is not known."""
    kind, tokens = metadata.get(MODEL), metadata.get(TOKENS)
    if not isinstance(tokens, list):
        raise UserError("the file has no tokenizer: use one with tokenizer.ggml.tokens")
    kinds = metadata.get(TYPES) or [NORMAL] * len(tokens)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": tokens[number], "special": kind != USER_DEFINED, **flags}
        for number, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    if kind not in GGUFVocabulary.registry:
        raise UserError(f"the tokenizer of the file is {kind!r}: known are {', '.join(GGUFVocabulary.registry)}")
    known = GGUFVocabulary.named(kind)
    vocab = {token: number for number, token in enumerate(tokens) if kinds[number] in (NORMAL, BYTE, UNKNOWN)}
    around = _around(metadata, tokens, known)
    return {"version": "1.0", "added_tokens": added, "post_processor": around, **known.parts(metadata, vocab)}


def _around(metadata: Mapping[str, Any], tokens: Sequence[str], known: type[GGUFVocabulary]) -> dict[str, Any] | None:
    """The post-processor that adds the first and the last token, where the file says so."""
    sides = []
    for name, usual in {"bos": known.before, "eos": known.after}.items():
        adds = metadata.get(f"tokenizer.ggml.add_{name}_token", bool(usual))
        found = [metadata.get(token_key(each), usual.get(each, len(tokens))) for each in (usual or {name})]
        if adds and max(found) >= len(tokens):
            raise UserError(f"the file adds a token to each text that it does not have ({name}): use a repaired file")
        sides.append(found if adds else [])
    ids = [*sides[0], *sides[1]]
    if not ids:
        return None
    pieces = [{"SpecialToken": {"id": tokens[number], "type_id": 0}} for number in ids]
    pieces.insert(len(sides[0]), {"Sequence": {"id": "A", "type_id": 0}})
    named = {tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]} for number in ids}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": named}


def _byte_level_parts(metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    name = metadata.get(PRE)
    if name not in PATTERNS:
        raise UserError(f"the file splits texts as {name!r}: known are {', '.join(PATTERNS)}")
    merges = [merge for merge in metadata.get(MERGES, []) if merge != NO_MERGE]
    splits = [
        {
            "type": "Split",
            "pattern": {"Regex": AS_IN_FILES.get(each, each)},
            "behavior": "Isolated",
            "invert": False,
        }
        for each in PATTERNS[name]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": name in WHOLE_WORDS},
        "decoder": byte_level,
    }


def _sentencepiece_parts(metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    scores = metadata[SCORES]
    made = [token for token in vocab if len(token) > 1 and not token.startswith("<0x")]
    pairs = [
        [token[:i], token[i:]]
        for token in sorted(made, key=lambda token: -scores[vocab[token]])
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prepended = metadata.get(ADD_SPACE, True)
    before = [{"type": "Prepend", "prepend": SPACE}] if prepended else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepended else []
    unknown = next((token for token, number in vocab.items() if metadata[TYPES][number] == UNKNOWN), None)
    model = {"vocab": vocab, "merges": pairs, "byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
        "model": {"type": "BPE", **model},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
    }
