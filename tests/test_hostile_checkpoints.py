"""Public checkpoints and tokenizers that ask for too much, or for other files, are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minitransformer import pretrained
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.shards import INDEX
from minitransformer.text.tokenizers import END_OF_TEXT, Tokenizer
from tests.hostile_for_tests import changed, checkpoint_folder, refused, tokenizer_folder


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "vocab_size", "n_positions", "n_inner", "n_head"])
@pytest.mark.parametrize("value", [9_984, 10**8, 10**9, 10**18])
def test_a_checkpoint_that_says_it_is_huge_is_refused(tmp_path: Path, name: str, value: int) -> None:
    path = checkpoint_folder(tmp_path / "checkpoint")
    changed(path / "config.json", **{name: value})
    refused(lambda: pretrained.load(path))


@pytest.mark.parametrize("positions", ["sinusoidal", "sinusoidal-halves"])
def test_a_table_of_positions_that_fits_no_memory_is_refused(positions: str) -> None:
    said = refused(lambda: ModelConfig(positions=positions, context_length=1 << 26, d_model=1 << 20))
    assert "does not fit into memory" in said


@pytest.mark.parametrize("name", ["bpe.json", "bytes.json", "chars.json"])
def test_an_id_larger_than_any_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    file = tokenizer_folder(tmp_path / "tokenizers") / name
    changed(file, special_tokens={END_OF_TEXT: 10**9})
    assert "token id 1000000000 is larger than any vocabulary" in refused(lambda: Tokenizer.load(file))


@pytest.mark.parametrize("pattern", ["", "a*", "a+", r"(?:(a*)*)*\1b", "(", "(" * 5000, "x" * 1_000_000])
def test_a_pattern_that_fails_or_leaves_out_text_is_refused(tmp_path: Path, pattern: str) -> None:
    file = tokenizer_folder(tmp_path / "tokenizers") / "bpe.json"
    changed(file, pattern=pattern)
    assert "not a tokenizer" in refused(lambda: Tokenizer.load(file))


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/SECRET", "a/../../secret.safetensors", ".", "..", "", "x" * 999, "\0", 5, None],
)
def test_no_shard_is_opened_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: Any) -> None:
    path = checkpoint_folder(tmp_path / "checkpoint")
    shutil.copy(path / "half-0.safetensors", tmp_path / "secret.safetensors")
    if shard == "/SECRET":
        shard = str(tmp_path / "secret.safetensors")
    places = json.loads((path / INDEX).read_text())["weight_map"]
    changed(path / INDEX, weight_map={**places, next(iter(places)): shard})
    opened: list[Path] = []
    monkeypatch.setattr("minitransformer.pretrained.shards._opened", opened.append)
    refused(lambda: pretrained.load(path))
    assert not opened
