"""Whatever file is damaged, it is opened or refused in one sentence: no traceback, no hang, no memory."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from minitransformer import pretrained
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.pretrained.shards import INDEX
from minitransformer.records import MOST_DEPTH, parse_json, read_json
from minitransformer.text.corpora import open_corpus
from minitransformer.text.tokenizers import END_OF_TEXT, Tokenizer
from tests.hostile_for_tests import (
    KINDS,
    SECONDS,
    at_most,
    changed,
    checkpoint_folder,
    refused,
    tokenizer_folder,
    tracebacks,
)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("run", name) for name in ("config.json", "tokenizer.json", "checkpoints/step-000005/manifest.json")),
        *(("checkpoint", name) for name in ("config.json", INDEX, "tokenizer.json", "generation_config.json")),
        *(("older checkpoint", name) for name in ("vocab.json", "tokenizer_config.json", "added_tokens.json")),
        *(("laboratory", name) for name in ("experiment.json", "sweep.json")),
        ("history", "config.json"),
    ],
)
def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    make, open_it = KINDS[kind]
    path = make(tmp_path / "folder")
    for depth in (200_000, MOST_DEPTH + 1):
        (path / name).write_bytes(b'{"a":' * depth + b"0" + b"}" * depth)
        assert name.rpartition("/")[2] in refused(lambda: open_it(path))


def test_depth_is_bounded_and_what_is_less_deep_is_read() -> None:
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    with pytest.raises(ValueError, match="deep"):
        parse_json("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1))


@pytest.mark.parametrize("content", [b'"\\ud800"', b'["\\uDFFF"]', b'{"\\ud800": 1}'])
def test_half_a_surrogate_pair_is_no_text(content: bytes) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        parse_json(content)
    assert parse_json(b'"\\ud83e\\udd8a \\\\ud800"') == "\N{FOX FACE} \\ud800"


def test_pipes_and_dangling_links_of_a_data_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "d.txt").symlink_to(tmp_path / "d.txt")
    with at_most(SECONDS):
        assert [piece.text for piece in open_corpus(str(tmp_path)).pieces()] == ["text"]


@pytest.mark.parametrize("kind", ["run", "checkpoint", "older checkpoint", "tokenizer", "laboratory"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    make, open_it = KINDS[kind]
    whole = make(tmp_path / "whole")
    for file in [file for file in whole.rglob("*") if file.suffix in (".json", ".jsonl", ".safetensors", ".txt")]:
        if file.parent.is_symlink():
            continue
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with at_most(SECONDS), suppress(UserError):
            open_it(whole)
        file.unlink()
        file.write_bytes(content)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "MB" in refused(lambda: read_json(tmp_path / "a.json", "use another"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_opened_or_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    assert tracebacks(kind, 40, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_thousand_damaged_files_give_no_traceback(tmp_path: Path, kind: str) -> None:
    assert tracebacks(kind, -(-4000 // len(KINDS)), tmp_path) == []


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
