"""Indices of shards of any content, and shards that do not fit theirs, are read or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from minitransformer.text.datasets import DataRequest, PlainText
from minitransformer.text.tokenizers import Bytes
from tests.fuzz_for_tests import any_texts, cases, for_cases, json_values, places_in, sentence_of, untouched, with_value
from tests.runs_for_tests import TEXT

INDEX: dict[str, Any] = {
    "format": 1,
    "tokenizer": "tokenizer.json",
    "shards": [{"path": "a.bin", "weight": 3.0, "tokens": 1501}, {"path": "b.bin", "weight": 2.0}],
    "validation": [{"path": "val.bin"}],
}
PATHS = [
    "",
    ".",
    "..",
    "/",
    "/dev/zero",
    "/dev/null",
    "index.json",
    "b.bin",
    "nothing.bin",
    "~nobody/a",
    "~nobody at all/a",
    "a\0b",
    "~",
    "a.bin/b",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    place = tmp_path / "data"
    place.mkdir()
    Bytes().save(place / "tokenizer.json")
    for number, name in enumerate(("a", "b", "val")):
        np.array([256, *TEXT[number * 2000 : number * 2000 + 1500].encode()], "<u2").tofile(place / f"{name}.bin")
    return place


def prepare(folder: Path, content: bytes) -> None:
    """Prepare the index, and read a row of what is prepared."""
    (folder / "index.json").write_bytes(content)
    with untouched(folder.parent, but="work"):
        data = PlainText.choose().make().prepare(DataRequest(str(folder / "index.json"), Bytes.choose(), 16))
        assert str(data.summary())


@cases(30, 500)
def test_any_value_in_an_index_is_taken_or_refused(folder: Path, count: int) -> None:
    places = st.sampled_from([*places_in(INDEX), ("shards", 0, "sha256"), ("validation", 0, "weight"), ("other",)])

    def check(place: tuple[Any, ...], value: Any) -> None:
        sentence_of(lambda: prepare(folder, json.dumps(with_value(INDEX, place, value)).encode()))

    for_cases(count, check, places, json_values | st.sampled_from(PATHS) | any_texts)


@cases(10, 200)
def test_shards_of_any_bytes_are_taken_or_refused(folder: Path, count: int) -> None:
    whole = {name: (folder / name).read_bytes() for name in ("a.bin", "b.bin", "val.bin", "tokenizer.json")}

    def check(name: str, content: bytes, start: float, keeps: bool) -> None:
        place = int(start * len(whole[name])) if keeps else 0
        (folder / name).write_bytes(whole[name][:place] + content)
        sentence_of(lambda: prepare(folder, json.dumps(INDEX).encode()))
        (folder / name).write_bytes(whole[name])

    for_cases(count, check, st.sampled_from(sorted(whole)), st.binary(max_size=100), st.floats(0, 1), st.booleans())


@cases(10, 100)
def test_files_that_are_no_index_are_taken_as_text_or_refused(folder: Path, count: int) -> None:
    def check(before: bytes, after: bytes) -> None:
        sentence_of(lambda: prepare(folder, before + b'{"shards": ' + after))

    for_cases(count, check, st.binary(max_size=9), st.binary(max_size=30))
