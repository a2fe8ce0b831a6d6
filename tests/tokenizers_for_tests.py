"""Tokenizers of public kinds, trained on a little prose by the `tokenizers` package."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minitransformer.pretrained.tokenizers import SPLITS

library = pytest.importorskip("tokenizers")


PROSE = [
    "The quick brown fox jumps over the lazy dog, doesn't it?  She'll say I've 12345 reasons.\n\n\tIndented text",
    "def f(x):\n    return x + 1  # naïve café, Größe, 東京, 🦊🦊 and ﬁligree\r\n",
    "Sphinx of black quartz, judge my vow. THE END. The end of the theory then there",
] * 4


LLAMA3 = next(iter(SPLITS))


def trained(model: Any, trainer: Any, **parts: Any) -> Any:
    tokenizer = library.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(PROSE, trainer)
    return tokenizer


def byte_level(pre_tokenizer: Any, special: str = "<|endoftext|>", **parts: Any) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    parts = {"pre_tokenizer": pre_tokenizer, "decoder": decoders.ByteLevel(), **parts}
    tokenizer = trained(models.BPE(), trainer, **parts)
    tokenizer.add_special_tokens([special, "<|other|>"])
    return tokenizer


def like_gpt2() -> Any:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def like_llama3() -> Any:
    steps = [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = byte_level(pre_tokenizers.Sequence(steps), "<|end_of_text|>")
    begin = ("<|other|>", tokenizer.token_to_id("<|other|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|other|> $A", special_tokens=[begin])
    return tokenizer


def like_qwen2() -> Any:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC())


def like_bert() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    return tokenizer


def like_t5() -> Any:
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def like_llama2() -> Any:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *fallback], show_progress=False),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return library.Tokenizer.from_str(json.dumps(content))
