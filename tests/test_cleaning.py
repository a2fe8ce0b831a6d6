"""Cleaning: what is removed is what was planted, what is kept stays as it was, and nothing else decides the result."""

import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import StorageError
from minitransformer.text import corpora
from minitransformer.text.cleaning import formats, verdicts
from minitransformer.text.cleaning.examination import EXACT, KEPT, LEAK, NEAR
from minitransformer.text.cleaning.formats import document_file
from minitransformer.text.cleaning.journal import RECORD, Examined, Journal
from minitransformer.text.cleaning.ngrams import hash_ngrams, hash_words
from minitransformer.text.cleaning.writing import REMOVED
from tests.dirty_for_tests import (
    changed_words,
    cleaned,
    judged,
    read_ids,
    read_texts,
    real_texts,
    write_jsonl,
)

TEXTS = real_texts(60, 40)
LEFT_OUT = [0, 7, 31]
"""documents that are planted a second time"""


@pytest.fixture(autouse=True)
def own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path_factory.mktemp("work")))


def with_copies() -> list[str]:
    return [*TEXTS, *(TEXTS[i] for i in LEFT_OUT)]


def write_documents(path: Path, texts: list[str]) -> None:
    """A file of these texts in the format that its name says, beside a column of numbers."""
    kind = formats.kind(path)
    if kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow (extra `data`)")
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)
        return
    comma = {".csv": ",", ".tsv": "\t"}.get(kind)
    lines = ["\n".join(texts) if comma is None else f"id{comma}text"]
    if kind == ".jsonl":
        lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    elif comma is not None:
        quoted = (text.replace('"', '""') for text in texts)
        lines += [f'{i}{comma}"{text}"' for i, text in enumerate(quoted)]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def documents_of(path: Path) -> list[str]:
    file = document_file(path, "text", "line")
    return [unit.text for block in file.blocks(lambda count: None, whole=True) for unit in file.parse(block)]


SUFFIXES = [".txt", ".md", ".txt.gz", ".jsonl", ".jsonl.gz", ".csv", ".tsv", ".csv.gz", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_later_of_equal_documents_is_removed_in_every_format_and_the_input_is_not_touched(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "BLOCK", 1 << 12)  # several blocks
    monkeypatch.setattr(corpora, "PIECE", 1 << 12)
    path = tmp_path / f"in{suffix}"
    write_documents(path, with_copies())
    before = path.read_bytes(), path.stat().st_mtime_ns
    unit = "line" if formats.kind(path) in (".txt", ".md") else "document"
    summary = cleaned(tmp_path / "out", path, unit=unit)
    assert documents_of(tmp_path / "out" / path.name) == TEXTS
    assert summary["removed"][0]["reason"] == "exact duplicate"
    assert summary["removed"][0]["documents"] == len(LEFT_OUT)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix.startswith((".jsonl", ".csv", ".parquet"))])
def test_other_fields_of_a_row_are_kept_where_its_text_is_changed(suffix: str, tmp_path: Path) -> None:
    write_documents(tmp_path / f"in{suffix}", ["a\x07 b", "caf\u0065\u0301"])
    cleaned(tmp_path / "out", tmp_path / f"in{suffix}")
    out = tmp_path / "out" / f"in{suffix}"
    assert documents_of(out) == ["a b", "café"]
    if suffix == ".parquet":
        from pyarrow.parquet import read_table

        assert read_table(out).column("id").to_pylist() == [0, 1]
    else:
        content = (gzip.decompress(out.read_bytes()) if suffix.endswith(".gz") else out.read_bytes()).decode()
        rows = {".jsonl": '{"id": 0, "text": "a b"}\n{"id": 1, "text": "café"}\n', ".csv": "id,text\n0,a b\n1,café\n"}
        assert content == rows[formats.kind(out)]


SPACED = st.text(st.sampled_from("ab \t\n\r"), min_size=1, max_size=60)


@given(SPACED, st.sampled_from(["line", "paragraph", "document"]))
def test_a_text_of_which_nothing_is_removed_is_written_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, text: str, unit: str
) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "in.txt").write_bytes(text.encode())
    cleaned(folder / "out", folder / "in.txt", unit=unit, normalise=(), duplicates="off")
    written = (folder / "out/in.txt").read_bytes().decode()
    assert written == (text if text.strip() else "")


def test_a_removed_paragraph_goes_with_the_blank_lines_after_it(tmp_path: Path) -> None:
    (tmp_path / "in.md").write_text("# One\n\ntwo\nlines\n\n\n# One\n\nlast")
    cleaned(tmp_path / "out", tmp_path / "in.md", unit="paragraph")
    assert (tmp_path / "out/in.md").read_text() == "# One\n\ntwo\nlines\n\n\nlast"


def test_rows_that_are_kept_unchanged_are_the_same_bytes(tmp_path: Path) -> None:
    lines = ['{"text" : "one", "x": 1.50}', '{"x": null, "text": "\\u00e9"}', '{"text": "one"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    cleaned(tmp_path / "out", tmp_path / "in.jsonl")
    assert (tmp_path / "out/in.jsonl").read_text() == "\n".join(lines[:2]) + "\n"


def test_every_removed_document_is_listed_with_its_place_and_reason(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "in/a.jsonl", [*TEXTS[:3], " ", f"{TEXTS[0]} "])
    second = write_jsonl(tmp_path / "in/deep/b.jsonl", [f"mail a.b@example.org {TEXTS[5]}", TEXTS[2]])
    cleaned(tmp_path / "out", tmp_path / "in")
    entries = [json.loads(line) for line in (tmp_path / "out" / REMOVED).read_text().splitlines()]
    assert [(entry["file"], entry["document"], entry["reason"]) for entry in entries] == [
        ("a.jsonl", 4, "empty"),
        ("a.jsonl", 5, "exact duplicate"),
        ("deep/b.jsonl", 2, "exact duplicate"),
    ]
    assert [entry.get("original") for entry in entries[1:]] == [
        {"file": "a.jsonl", "document": 1},
        {"file": "a.jsonl", "document": 3},
    ]
    assert read_ids(tmp_path / "out" / first.name) == [0, 1, 2]
    assert read_ids(tmp_path / "out/deep" / second.name) == [0]


def test_the_result_is_the_same_whatever_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{text} {i % 50}" for i, text in enumerate(real_texts(300, 40) * 30)]
    path = write_jsonl(
        tmp_path / "in.jsonl", texts
    )  # three blocks of the usual size, in processes that are not patched
    assert path.stat().st_size > 2 * formats.BLOCK
    summaries = []
    for workers in (1, 2):
        monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / f"work{workers}"))
        summaries.append(cleaned(tmp_path / f"out{workers}", path, workers=workers, rules=()))
    assert summaries[0] == summaries[1]
    assert summaries[0]["removed"][0]["documents"] > 1000
    for name in (path.name, REMOVED):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


# --- resumed


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small blocks; `stopping(n)` lets a reading end with an error after n of them, and counts those that are read."""
    monkeypatch.setattr(formats, "BLOCK", 1 << 10)
    monkeypatch.setattr(corpora, "PIECE", 1 << 10)
    counter, examine = Counter[str](), verdicts.examine_block

    def stop_after(blocks: int) -> Counter[str]:
        counter.clear()

        def examine_some(*arguments: Any) -> Any:
            if counter["blocks"] == blocks:
                raise StorageError("the machine was switched off")
            counter["blocks"] += 1
            return examine(*arguments)

        monkeypatch.setattr(verdicts, "examine_block", examine_some)
        return counter

    return stop_after


def test_a_reading_that_was_stopped_goes_on_where_it_was_and_finds_the_same(
    tmp_path: Path, stopping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", with_copies())
    counter = stopping(1000)
    expected = cleaned(tmp_path / "whole", path)
    whole = counter["blocks"]
    assert whole > 8
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "again"))
    stopping(5)
    with pytest.raises(StorageError, match="switched off"):
        cleaned(tmp_path / "out", path)
    counter = stopping(1000)
    assert cleaned(tmp_path / "out", path) == expected
    assert counter["blocks"] == whole - 5
    for name in (path.name, REMOVED):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("damage", ["half a line", "a stream without its end"])
def test_a_block_that_was_not_written_to_its_end_is_examined_again(damage: str, tmp_path: Path, stopping: Any) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", with_copies())
    stopping(5)
    with pytest.raises(StorageError):
        judged(path)
    [blocks] = Path(os.environ["MINITRANSFORMER_DATA"]).glob("cleaning/*/blocks.jsonl")
    damaged = blocks if damage == "half a line" else blocks.with_name("documents.bin")
    with damaged.open("r+b") as file:
        file.truncate(damaged.stat().st_size - 3)
    counter = stopping(1000)
    found = judged(path)[1].codes
    again = counter["blocks"]
    assert np.flatnonzero(found == EXACT).tolist() == [60, 61, 62]
    assert again == len(judged(path)[1].journal.blocks) - 4


def test_files_that_are_written_already_are_not_written_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"in/{name}.jsonl", TEXTS[:3])
    cleaned(tmp_path / "out", tmp_path / "in")
    written = tmp_path / "out/a.jsonl"
    before = written.stat().st_mtime_ns
    (tmp_path / "out/b.jsonl").unlink()
    cleaned(tmp_path / "out", tmp_path / "in")
    assert written.stat().st_mtime_ns == before
    assert (tmp_path / "out/b.jsonl").read_text() == ""


@pytest.mark.slow
def test_a_killed_cleaning_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [f"{text} {i % 900}" for i, text in enumerate(real_texts(300, 40) * 200)])
    program = [sys.executable, "-m", "minitransformer", "data", "clean", str(path)]
    for out, kills in (("whole", 0), ("killed", 4)):
        environment = {**os.environ, "MINITRANSFORMER_DATA": str(tmp_path / f"work-{out}")}
        command = [*program, "--out", str(tmp_path / out)]
        for kill in range(kills):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            try:
                process.wait(timeout=0.8 + kill / 2)
            except subprocess.TimeoutExpired:
                process.kill()
            process.wait()
        assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    for name in (path.name, REMOVED, "report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- found


def test_words_and_ngrams_are_the_same_alone_and_among_others() -> None:
    texts = ["One, two three.", "", "one TWO  three", "...", "四五六 a", "two", "x" * 3000, "x" * 2999 + "y"]
    words = hash_words(texts)
    for n in (1, 2, 3, 13):
        grams = hash_ngrams(words, n)
        for i, text in enumerate(texts):
            alone = hash_ngrams(hash_words([text]), n).hashes
            assert grams.hashes[grams.offsets[i] : grams.offsets[i + 1]].tolist() == alone.tolist()
    counts = np.diff(words.offsets).tolist()
    assert counts == [3, 0, 3, 0, 4, 1, 1, 1]
    assert words.hashes[:3].tolist() == words.hashes[3:6].tolist()
    assert len(set(words.hashes[-2:].tolist())) == 2
    assert hash_words(["two"]).hashes[0] == 3035460779629883687, "hashes are stored, and may not change"


@given(st.lists(st.text(st.sampled_from("ab .一"), max_size=12), max_size=6), st.integers(1, 4))
def test_texts_have_the_same_ngrams_when_they_have_the_same_words_in_a_row(texts: list[str], n: int) -> None:
    grams = hash_ngrams(hash_words(texts), n)

    def plain(text: str) -> list[tuple[str, ...]]:
        words = text.replace("一", " 一 ").replace(".", " ").split()
        return [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))]

    expected = [gram for text in texts for gram in plain(text)]
    assert len(grams.hashes) == len(expected)
    assert len(set(grams.hashes.tolist())) == len(set(expected))


def test_planted_copies_are_all_found_and_nothing_else(tmp_path: Path) -> None:
    texts, draw = real_texts(600, 40), random.Random(0)
    copies = draw.choices(texts, k=200)
    codes = judged(write_jsonl(tmp_path / "in.jsonl", texts + copies))[1].codes
    assert (codes[:600] == KEPT).all()
    assert (codes[600:] == EXACT).all()


@pytest.mark.parametrize("words", [40, 120])
def test_nine_in_ten_words_alike_are_near_duplicates_and_other_texts_are_not(words: int, tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="near duplicates are found by rensa (extra `data`)")
    texts, draw = real_texts(300, words), random.Random(words)
    originals = draw.sample(range(300), 150)
    near = [changed_words(texts[i], 0.1, draw) for i in originals]
    _, found = judged(write_jsonl(tmp_path / "in.jsonl", texts + near + near[:20]), duplicates="near")
    assert (found.codes[:300] == KEPT).all(), "precision"
    right = [found.original_of(300 + k) == i for k, i in enumerate(originals)]
    assert np.mean(found.codes[300:450] == NEAR) == np.mean(right) >= 0.95, "recall"
    assert (found.codes[450:] == EXACT).all()


def test_less_alike_texts_are_kept_where_more_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="near duplicates are found by rensa (extra `data`)")
    draw = random.Random(0)
    path = write_jsonl(tmp_path / "in.jsonl", [*real_texts(50, 120), changed_words(real_texts(1, 120)[0], 0.1, draw)])
    assert judged(path, duplicates="near", alike=0.97)[1].codes[-1] == KEPT


def test_leaks_of_whole_documents_and_in_others_are_found_and_nothing_else(tmp_path: Path) -> None:
    texts = real_texts(600, 40)
    held_out, train = texts[:200], texts[200:]
    inside = [f"{mine}\n{leak.upper()} {mine[:50]}" for mine, leak in zip(train, held_out[100:], strict=False)]
    against = write_jsonl(tmp_path / "test.jsonl", [*held_out, "never seen " * 20])
    data = write_jsonl(tmp_path / "in.jsonl", train + held_out[:100] + inside)
    found = judged(data, against=(str(against),))[1]
    assert (found.codes[:400] == KEPT).all(), "precision"
    assert (found.codes[400:] == LEAK).mean() >= 0.99, "recall"
    summary = cleaned(tmp_path / "out", data, against=(str(against),))
    assert summary["held_out"] == {
        **{"words": 13, "documents": 201, "sharing_any": 200, "sharing_half": 200, "sharing_all": 200}
    }
    assert len(read_texts(tmp_path / "out/in.jsonl")) == 400


def test_a_phrase_in_common_use_is_no_leak(tmp_path: Path) -> None:
    licence = "licensed under the terms of the agreement that you find beside this file or ask for by letter"
    train = [f"{licence} {text}" for text in real_texts(20, 40)]
    held_out = f"{licence} {real_texts(21, 40)[20]}"
    against = write_jsonl(tmp_path / "test.jsonl", [held_out])
    found = judged(write_jsonl(tmp_path / "in.jsonl", [*train, held_out]), against=(str(against),))[1]
    assert found.codes.tolist() == [KEPT] * 20 + [LEAK]


def test_a_field_of_all_documents_takes_the_memory_of_that_field(tmp_path: Path) -> None:
    journal, rows = Journal.open(tmp_path), np.zeros(1 << 19, RECORD)
    rows["verdict"] = np.arange(len(rows)) % 7
    journal.add(0, Examined({"documents": rows}, {}))
    tracemalloc.start()
    try:
        verdicts = journal.column("verdict")
        assert (verdicts == rows["verdict"]).all()
        assert tracemalloc.get_traced_memory()[1] < rows.nbytes / 3  # rather than that of all fields
    finally:
        tracemalloc.stop()
