"""Preparation that fails, is killed, or is not alone: its files are there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.files import locked
from minitransformer.text.corpora import Corpus, Piece
from tests.prepared_for_tests import FILES, contents, fitted, leftovers, made, stories, written

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_is_made_again(tmp_path: Path, name: str) -> None:
    corpus = written(tmp_path / "a.jsonl", stories(50))
    prepared = made(corpus)
    before = contents(prepared.folder)
    with (prepared.folder / name).open("rb+") as file:
        file.truncate(10)
    assert contents(made(corpus).folder) == before


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, work: Path) -> None:
    corpus = written(tmp_path / "a.jsonl", [*stories(50), "ж"])
    with pytest.raises(UserError, match=r"U\+0436"):
        made(corpus, fitted("chars", *stories(50)), workers=3)
    assert not leftovers(work)
    assert not list((work / "prepared").glob("*/meta.json"))


@pytest.mark.parametrize("after", [1, 2])
def test_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """After the first reading, which scans, or the second, which encodes."""
    corpus = written(tmp_path / "a.jsonl", stories(50))
    whole, readings = Corpus.pieces, []

    def growing(self: Corpus, *rest: Any) -> Iterator[Piece]:
        yield from whole(self, *rest)
        readings.append(1)
        if len(readings) < after:
            return
        with self.files[0].open("a") as file:
            file.write('{"text": "and then"}\n')

    monkeypatch.setattr(Corpus, "pieces", growing)
    with pytest.raises(UserError, match="changed while being read"):
        made(corpus)
    assert not leftovers(work)


# Prepares ARGV[1] with an encoder slowed down so that a signal finds it half-way.
SLOW = """
import sys, time
from minitransformer.text.corpora import open_corpus
from minitransformer.text.datasets.text import TextPreparation
from minitransformer.text.tokenizers import Bytes
quick = Bytes.encode_array
def slow(self, text):
    time.sleep(float(sys.argv[2]))
    return quick(self, text)
Bytes.encode_array = slow
made = TextPreparation(
    open_corpus(sys.argv[1]), Bytes.choose(), validation_fraction=0.1, context_length=8, workers=2, progress=False
).run()
print(made.folder)
"""


def start(data: Path, delay: float, code: str = SLOW) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(data), str(delay)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_preparation_is_never_taken_for_whole(tmp_path: Path, work: Path, how: signal.Signals) -> None:
    corpus = written(tmp_path / "a.jsonl", stories(100))
    clean = made(corpus, cache=tmp_path / "clean")
    process = start(tmp_path / "a.jsonl", 0.1)
    deadline = time.monotonic() + 30
    while not leftovers(work) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(how)
    process.communicate()
    assert process.returncode != 0
    assert bool(leftovers(work)) == (how == signal.SIGKILL)
    assert not list((work / "prepared").glob("*[0-9a-f]/meta.json"))
    assert contents(made(corpus).folder) == contents(clean.folder)
    assert not leftovers(work)


def test_two_processes_that_want_the_same_build_it_once(tmp_path: Path, work: Path) -> None:
    corpus = written(tmp_path / "a.jsonl", stories(100))
    processes = [start(tmp_path / "a.jsonl", 0.01) for _ in range(3)]
    answers = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    folders = {Path(out.strip()) for out, _ in answers}
    assert len(folders) == 1
    assert contents(folders.pop()) == contents(made(corpus, cache=tmp_path / "clean").folder)
    assert not leftovers(work)


def test_nobody_deletes_what_a_living_process_is_building(tmp_path: Path, work: Path) -> None:
    (work / "prepared" / "abc-1.partial").mkdir(parents=True)
    with locked(work / "prepared" / "abc"):
        made(written(tmp_path / "a.jsonl", stories(50)))
        assert leftovers(work) == ["abc-1.partial"]
    made(written(tmp_path / "a.jsonl", stories(50)))
    assert not leftovers(work)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(tmp_path: Path, work: Path) -> None:
    """By a limit on the size of files, which fails a write half-way as a full disk does."""
    written(tmp_path / "a.jsonl", stories(200))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    caught = "from minitransformer.errors import UserError\ntry:\n" + SLOW.replace("\n", "\n    ")
    process = start(tmp_path / "a.jsonl", 0, limited + caught + "\nexcept UserError as error: print(error)")
    out, err = process.communicate()
    assert out.startswith("no space left while writing"), (out, err)
    assert "MINITRANSFORMER_DATA" in out
    assert not leftovers(work)
    assert not list((work / "prepared").glob("*/meta.json"))


def test_a_work_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    corpus = written(tmp_path / "a.jsonl", stories(20))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written .*MINITRANSFORMER_DATA"):
        made(corpus)
