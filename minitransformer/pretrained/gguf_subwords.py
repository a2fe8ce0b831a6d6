"""WordPiece and unigram tokenizers in GGUF files: those of BERT, and of T5 and XLM-RoBERTa."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, ClassVar

from minitransformer.errors import UserError
from minitransformer.pretrained.gguf_vocabularies import (
    ADD_SPACE,
    CONTROL,
    PRE,
    SCORES,
    SPACE,
    TOKENS,
    TYPES,
    UNKNOWN,
    UNUSED,
    GGUFVocabulary,
    Metadata,
    token_key,
)
from minitransformer.pretrained.tokenizers import steps_of, template
from minitransformer.pretrained.unigram_files import METASPACE

CONTINUES = "##"
LOWERCASE, STRIP_ACCENTS = (f"tokenizer.ggml.normalizer.{name}" for name in ("lowercase", "strip_accents"))
CHARSMAP, MERGE_SPACES = (f"tokenizer.ggml.{name}" for name in ("precompiled_charsmap", "remove_extra_whitespaces"))
NEVER = -10000.0
"""score of a token that no text spells"""
UNKNOWN_WORD = "[UNK]"


class WordPieceGGUF(GGUFVocabulary, name="bert"):
    """WordPiece. Files mark the start of a word by a space instead of its continuation by ##."""

    before: ClassVar[dict[str, int]] = {"bos": 101}
    after: ClassVar[dict[str, int]] = {"seperator": 102}

    @classmethod
    def holds(cls, model: Mapping[str, Any]) -> bool:
        return model.get("type") == "WordPiece"

    @classmethod
    def metadata(cls, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> Metadata:
        _check_wordpiece(content)
        ids = {token: number for number, token in enumerate(tokens)}
        [first], [last] = template(content.get("post_processor"))
        named = {"bos": first, "seperator": last, "unknown": ids.get(content["model"]["unk_token"])}
        named["mask"] = ids.get("[MASK]")
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind not in (CONTROL, UNUSED):
                tokens[number] = token.removeprefix(CONTINUES) if token.startswith(CONTINUES) else SPACE + token
        normalizer = content["normalizer"]
        lowercase, strips = normalizer["lowercase"], normalizer["strip_accents"]
        written = {LOWERCASE: lowercase, STRIP_ACCENTS: lowercase if strips is None else strips, PRE: "default"}
        return written | {token_key(name): number for name, number in named.items() if number is not None}

    @classmethod
    def parts(cls, metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
        words = enumerate(zip(metadata[TOKENS], metadata[TYPES], strict=True))
        written = {_with_marks(token, kind): number for number, (token, kind) in words if kind != UNUSED}
        lowercase = metadata.get(LOWERCASE, True)
        options = {"clean_text": True, "handle_chinese_chars": True, "lowercase": lowercase}
        unknown = metadata[TOKENS][metadata.get(token_key("unknown"), 100)]
        model = {"unk_token": unknown, "continuing_subword_prefix": CONTINUES, "max_input_chars_per_word": 100}
        strips = metadata.get(STRIP_ACCENTS, lowercase)
        return {
            "normalizer": {"type": "BertNormalizer", "strip_accents": strips, **options},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {"type": "WordPiece", "vocab": written, **model},
            "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": True},
        }


def _with_marks(token: str, kind: int) -> str:
    if kind == CONTROL:
        return token
    return token.removeprefix(SPACE) if token.startswith(SPACE) else CONTINUES + token


def _check_wordpiece(content: dict[str, Any]) -> None:
    """Raises `UserError` with all in which a tokenizer is not as llama.cpp splits words."""
    normalizer, before = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    reasons = {
        "does not normalise as BERT does": normalizer.get("type") != "BertNormalizer",
        "keeps control characters": normalizer.get("clean_text") is False,
        "keeps Chinese characters together": normalizer.get("handle_chinese_chars") is False,
        "does not split words as BERT does": before.get("type") != "BertPreTokenizer",
        "has another mark than ##": content["model"].get("continuing_subword_prefix") != CONTINUES,
        "does not put one token before and one after a text": [
            len(side) for side in template(content.get("post_processor"))
        ]
        != [1, 1],
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise UserError(f"the tokenizer {'; '.join(found)}, as llama.cpp's WordPiece: choose --format hf")


class UnigramGGUF(GGUFVocabulary, name="t5"):
    """The unigram model of SentencePiece: the likeliest pieces by their scores."""

    after: ClassVar[dict[str, int]] = {"eos": 1}

    @classmethod
    def holds(cls, model: Mapping[str, Any]) -> bool:
        return model.get("type") == "Unigram" and not model.get("byte_fallback")

    @classmethod
    def metadata(cls, content: dict[str, Any], tokens: list[str], kinds: list[int]) -> Metadata:
        model, known = content["model"], len(content["model"]["vocab"])
        scores = [score for _, score in model["vocab"]] + [NEVER] * (len(tokens) - known)
        unknown = model["unk_id"]
        kinds[unknown] = UNKNOWN
        steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
        split = {step["type"]: step for step in steps}
        normalizers = steps_of(content.get("normalizer"), "normalizers")
        maps = [base64.b64decode(step["precompiled_charsmap"]) for step in normalizers if step["type"] == "Precompiled"]
        merges = "WhitespaceSplit" in split or any(step["type"] == "Replace" for step in normalizers)
        written = {
            PRE: "default",
            SCORES: [float(score) for score in scores],
            ADD_SPACE: split.get("Metaspace", {}).get("prepend_scheme", "never") != "never",
            MERGE_SPACES: merges,
            token_key("unknown"): unknown,
        }
        return written | ({CHARSMAP: maps[0]} if maps else {})

    @classmethod
    def parts(cls, metadata: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
        prepends = "always" if metadata.get(ADD_SPACE, True) else "never"
        metaspace = {**METASPACE, "prepend_scheme": prepends}
        merges = [{"type": "WhitespaceSplit"}] if metadata.get(MERGE_SPACES) else []
        vocabulary = [list(pair) for pair in zip(metadata[TOKENS], metadata[SCORES], strict=True)]
        unknown = metadata.get(token_key("unknown"), 2)
        normalizer = None
        if len(characters := bytes(metadata.get(CHARSMAP, ()))):
            normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters).decode()}
        return {
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*merges, metaspace]},
            "model": {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": False},
            "decoder": metaspace,
        }
