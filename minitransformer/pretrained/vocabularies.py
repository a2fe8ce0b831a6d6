"""Tokenizers older than tokenizer.json: their vocabulary files, converted to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.pretrained.shards import read_checkpoint_json
from minitransformer.text.tokenizers import END_OF_TEXT

VOCABULARY, MERGES, WORDS, ADDED = "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"
FILES = (VOCABULARY, MERGES, WORDS, ADDED)
# Families that use vocab.json and merges.txt with GPT-2's split pattern; others use the same files differently.
LIKE_GPT2 = ("gpt2", "gptj", "opt", "roberta", "bart")
BETWEEN_BRACKETS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
NEOX_CLASSES = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
CLASS_OF = {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer", "gpt_neox": "GPTNeoXTokenizer"}
BETWEEN_ANGLES = (END_OF_TEXT, "<s>", "<pad>", "</s>", "<unk>", "<mask>")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
WORDPIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "source.spm", "target.spm")


def content_of_vocabulary(folder: Path, settings: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    """The content of a tokenizer.json for the older files in `folder`; None without known files.

    Byte-level BPE (Radford et al. 2019) from vocab.json and merges.txt, WordPiece (Devlin et al. 2018) from vocab.txt;
    `settings`, those of tokenizer_config.json, give the options. Raises `UserError` for damaged files.
    """
    if model_type in LIKE_GPT2 and (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        return _byte_level(folder, settings, model_type)
    if model_type in ("bert", "distilbert") and (folder / WORDS).is_file():
        return _wordpiece(folder, settings)
    return None


def how_to_make_one(name: str) -> str:
    """The error for importing `name`, a folder or a name on the hub, without a known tokenizer."""
    folder = Path(name)
    found = [file for file in (*SENTENCEPIECE, VOCABULARY) if (folder / file).is_file()]
    having = f", but {found[0]}, which only its own library reads" if found else ", which a run needs"
    to = name if folder.is_dir() else "FOLDER"
    command = f"from transformers import AutoTokenizer as T; T.from_pretrained('{name}').save_pretrained('{to}')"
    where = "" if folder.is_dir() else ", where FOLDER holds the checkpoint"
    return f'{name} has no tokenizer.json{having}: make one with python -c "{command}"{where}'


def _byte_level(folder: Path, settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    vocabulary = read_checkpoint_json(folder / VOCABULARY)
    merges = [line for line in _lines(folder / MERGES) if line and not line.startswith("#version")]
    byte_level = {**BYTE_LEVEL, "add_prefix_space": bool(settings.get("add_prefix_space", False))}
    special = _special(folder, vocabulary, settings, BETWEEN_ANGLES)
    return {
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "post_processor": _around_byte_level(vocabulary, settings, model_type),
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _around_byte_level(vocabulary: dict[str, int], settings: dict[str, Any], model_type: str) -> dict[str, Any] | None:
    if model_type in ("roberta", "bart"):
        first, last = token_name(settings.get("cls_token", "<s>")), token_name(settings.get("sep_token", "</s>"))
        return {
            "type": "RobertaProcessing",
            "sep": [last, vocabulary[last]],
            "cls": [first, vocabulary[first]],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    if settings.get("add_bos_token", model_type == "opt"):
        first = token_name(settings.get("bos_token", "</s>" if model_type == "opt" else END_OF_TEXT))
        text = {"Sequence": {"id": "A", "type_id": 0}}
        piece = {"SpecialToken": {"id": first, "type_id": 0}}
        ids = {first: {"id": first, "ids": [vocabulary[first]], "tokens": [first]}}
        pair = [piece, text, {"Sequence": {"id": "B", "type_id": 1}}]
        return {"type": "TemplateProcessing", "single": [piece, text], "pair": pair, "special_tokens": ids}
    return None


def _wordpiece(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    vocabulary = {word: number for number, word in enumerate(_lines(folder / WORDS))}
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in vocabulary]
    if missing:
        raise UserError(f"{folder / WORDS} lacks {', '.join(missing)}: use the vocab.txt of a BERT model")
    return {
        "added_tokens": _special(folder, vocabulary, settings, BETWEEN_BRACKETS),
        "normalizer": bert_normalizer(settings),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", vocabulary["[SEP]"]],
            "cls": ["[CLS]", vocabulary["[CLS]"]],
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {**WORDPIECE, "max_input_chars_per_word": 100, "vocab": vocabulary},
    }


def as_its_class_reads_it(content: dict[str, Any], settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The content of a tokenizer.json, modified as the transformers class for it does.

    The class for BERT normalises by its settings, and that for GPT-NeoX as Unicode does, regardless of the file.
    """
    chosen = settings.get("tokenizer_class") or CLASS_OF.get(model_type)
    if chosen in NEOX_CLASSES:
        return {**content, "normalizer": {"type": "NFC"}}
    return {**content, "normalizer": bert_normalizer(settings)} if chosen in BERT_CLASSES else content


def bert_normalizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The normalizer of BERT's tokenizer. Devlin et al. 2018, public code."""
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),
        "lowercase": settings.get("do_lower_case", True),
    }


def _special(
    folder: Path, vocabulary: dict[str, int], settings: dict[str, Any], usual: Iterable[str]
) -> list[dict[str, Any]]:
    """The special tokens: those with usual names, those that the settings name, and those that were added."""
    added = read_checkpoint_json(folder / ADDED) if (folder / ADDED).is_file() else {}
    ids: dict[str, int] = {**vocabulary, **added}
    named = [token_name(value) for name, value in settings.items() if name.endswith("_token") and value]
    names = dict.fromkeys([*(name for name in (*usual, *named) if name in ids), *added])
    return [added_token(number, name) for number, name in sorted((ids[name], name) for name in names)]


def added_token(number: int, name: str) -> dict[str, Any]:
    """A special token in a tokenizer.json."""
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    # RoBERTa's mask includes the space before it, which version 5 of transformers omits here.
    return {"id": number, "content": name, "lstrip": name == "<mask>", **flags}


def token_name(token: Any) -> str:
    """A special token of tokenizer_config.json, which may be described by more than its name."""
    return str(token["content"] if isinstance(token, dict) else token)


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
