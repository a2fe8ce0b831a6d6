"""Whatever file is damaged, it is opened or refused in one sentence: no traceback, no hang, no memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from minitransformer.errors import UserError
from minitransformer.pretrained.shards import INDEX
from minitransformer.records import MOST_DEPTH, parse_json, read_json
from minitransformer.text.corpora import open_corpus
from tests.hostile_for_tests import KINDS, SECONDS, at_most, refused, tracebacks


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
