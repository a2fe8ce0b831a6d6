"""Texts to prepare, and what preparing them left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.settings import Chosen
from minitransformer.text.corpora import Corpus, open_corpus
from minitransformer.text.datasets.text import PreparedText, TextPreparation
from minitransformer.text.tokenizers import Tokenizer

FILES = ("train.bin", "validation.bin", "tokenizer.json", "meta.json")


def stories(count: int) -> list[str]:
    return [f"Story number {i}: once upon a time there were {i * i} owls.\n" * (1 + i % 5) for i in range(count)]


def written(path: Path, documents: list[str]) -> Corpus:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return open_corpus(str(path))


def fitted(tokenizer: str | Chosen[Tokenizer], *texts: str, vocab_size: int | None = None) -> Tokenizer:
    """A `tokenizer`, by name with its default settings, fitted to `texts`."""
    chosen = Tokenizer.choose(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return chosen.variant.fit(chosen.settings, lambda: iter(texts), vocab_size)


def made(corpus: Corpus, tokenizer: Any = "bytes", **settings: Any) -> PreparedText:
    defaults = {"validation_fraction": 0.1, "context_length": 8, "progress": False}
    tokenizer = Tokenizer.choose(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return TextPreparation(corpus, tokenizer, **{**defaults, **settings}).run()


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def documents(prepared: PreparedText, tokens: np.ndarray) -> list[str]:
    starts = np.flatnonzero(tokens == prepared.tokenizer.end_of_text)
    assert starts[0] == 0
    return [prepared.tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])]


def leftovers(work: Path) -> list[str]:
    return [path.name for path in (work / "prepared").rglob("*") if ".partial" in path.name]
