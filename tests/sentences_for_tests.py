"""Folders of the sentence-transformers library, with random models, and what transformers makes of texts with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tokenizers_for_tests import like_bert

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, Größe",
    "",
    "Sphinx of black quartz, judge my vow. " * 20,
    "The end",
]
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
"""all-MiniLM-L6-v2, but for its vocabulary"""
TINY = {**MINILM, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODULES = ("Transformer", "Pooling", "Normalize")


def write_sentence_folder(
    folder: Path,
    sizes: dict[str, Any] = TINY,
    *,
    architecture: str = "BertModel",
    tokenizer: Any = None,
    modules: tuple[str, ...] = MODULES,
    pooling: dict[str, Any] | None = None,
    texts: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
) -> Path:
    """A folder as sentence-transformers writes one, with a random encoder that transformers has made."""
    library = pytest.importorskip("transformers", reason="the reference implementation is not installed")
    library.logging.disable_progress_bar()  # on the standard error that a test reads
    if tokenizer is None:
        tokenizer = like_bert()
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
        _write(folder / "tokenizer_config.json", settings)
    kind = getattr(library, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=tokenizer.get_vocab_size(), initializer_range=0.1, **sizes))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    places = ["", *(f"{number}_{name}" for number, name in enumerate(modules) if number)]
    described = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{name}"}
        for number, (name, place) in enumerate(zip(modules, places, strict=True))
    ]
    _write(folder / "modules.json", described)
    mean = {"word_embedding_dimension": sizes["hidden_size"], "pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling" / "config.json", mean if pooling is None else pooling)
    _write(folder / "sentence_bert_config.json", texts or {"max_seq_length": 64, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", prompts or {"prompts": {}, "default_prompt_name": None})
    return folder


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@torch.inference_mode()
def reference_embeddings(folder: Path, texts: list[str], *, pooling: str = "mean", normalise: bool = True) -> Tensor:
    """What transformers gives for `texts`, at most 64 tokens each, by the recipe that every model card prints."""
    library = pytest.importorskip("transformers")
    tokenizer, model = library.AutoTokenizer.from_pretrained(folder), library.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None].float()
    if pooling == "mean":
        pooled = (hidden * mask).sum(1) / mask.sum(1)
    else:
        places = torch.zeros(len(texts), dtype=torch.long) if pooling == "first" else mask[..., 0].sum(1).long() - 1
        pooled = hidden[torch.arange(len(texts)), places]
    return F.normalize(pooled) if normalise else pooled
