"""Corpora: whatever `--data` names streams in one order, whole, in bounded pieces; what is no text is named."""

from __future__ import annotations

import codecs
import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.text import corpora
from minitransformer.text.corpora import cut, open_corpus


@pytest.fixture(autouse=True)
def _own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path_factory.mktemp("work")))


def documents(data: Path | str, field: str = "text") -> list[str]:
    found: list[str] = []
    for piece in open_corpus(str(data), field).pieces():
        if piece.opens:
            found.append("")
        found[-1] += piece.text
    return found


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@given(texts=st.lists(st.text()), size=st.integers(1, 50))
def test_pieces_are_bounded_and_join_to_the_whole(texts: list[str], size: int) -> None:
    pieces = list(cut(texts, size))
    assert "".join(pieces) == "".join(texts)
    assert all(0 < len(piece) <= size for piece in pieces)


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), size=st.integers(1, 7))
@settings(deadline=None)
def test_a_file_reads_as_it_was_written_however_it_is_cut(tmp_path_factory, text: str, size: int) -> None:
    path = tmp_path_factory.mktemp("read") / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 * (not text.startswith("\ufeff")) + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", max(size, 3))
        assert "".join(corpora.read(path)) == text.removeprefix("\ufeff")


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
@settings(deadline=None)
def test_a_line_of_jsonl_is_a_document(tmp_path_factory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    path.write_bytes("\n\n".join([*lines, "{}"[:0]]).encode() or b"\n")
    assert documents(path) == [text for text in texts if text]


def test_a_folder_is_read_in_the_order_of_its_names_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.py", ".hidden/x.txt", ".y.txt", "c.jpg", "d", "empty.txt", "e.txt.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if "empty" in name else gzip.compress(b"packed") if name.endswith("gz") else name.encode())
    corpus = open_corpus(str(tmp_path))
    assert documents(tmp_path) == ["b.txt", "packed", "a/z.md", "a/y.py"] or documents(tmp_path) == [
        "b.txt",
        "packed",
        "a/y.py",
        "a/z.md",
    ]
    assert corpus.skipped == 2
    assert list(corpus.files) == list(open_corpus(str(tmp_path)).files)


def test_a_glob_takes_files_of_any_name(tmp_path: Path) -> None:
    for name in ("b.log", "a.log", "c.txt"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "*.log") == ["a.log", "b.log"]


def test_newlines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert documents(tmp_path / "a.txt") == ["a\r\nb\rc\n"]


def test_jsonl_reads_the_field_that_is_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes\u2028still"}, {"body": ""}, {"body": "two"})
    assert documents(path, "body") == ["yes\u2028still", "two"]


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 200_000)
    heard: list[int] = []
    corpus = open_corpus(str(tmp_path))
    list(corpus.pieces(heard.append))
    assert sum(heard) == corpus.size
    assert len(heard) > 1


def test_a_large_file_is_never_held_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line of words\n" * 1_000_000)
    tracemalloc.start()
    total = sum(len(piece.text) for piece in open_corpus(str(tmp_path / "a.txt")).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 16_000_000
    assert peak < 16 * corpora.PIECE


def written(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"text\0more", "NUL"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8 at byte 0|NUL"),
        ("a.txt", b"caf\xe9 au lait", r"not UTF-8 at byte 3 \(0xe9\)"),
        ("a.txt", codecs.BOM_UTF8[:2], "not UTF-8 at byte 0"),
        ("a.txt", b"x" * 300_000 + "é".encode()[:1], "not UTF-8 at byte 300000"),
        ("a.txt", b"x" * (corpora.PIECE - 1) + b"\xc3(", f"not UTF-8 at byte {corpora.PIECE - 1} "),
        ("a.txt.gz", b"not packed", "gzip"),
        ("a.txt.gz", gzip.compress(b"packed " * 999, mtime=0)[:-20], "cut short"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}', "line 3 has a field 'text' that is not a string"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "n": 1}', "line 2 has no field 'text': its strings are 'body'"),
        ("a.jsonl", b'{"text": "a"}\n["text"]', "line 2 has no field"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 holds half a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        documents(written(tmp_path, name, content))
    assert name in str(caught.value)


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    written(tmp_path, "a.jpg", b"jpg")
    with pytest.raises(UserError, match="no text among its 1 files"):
        open_corpus(str(tmp_path))


def test_a_glob_without_matches_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches '.*\*\.txt'"):
        open_corpus(str(tmp_path / "*.txt"))


def test_a_missing_path_suggests_the_recipe_it_looks_like() -> None:
    with pytest.raises(UserError, match="did you mean the recipe 'shakespeare'"):
        open_corpus("shakespear")
    with pytest.raises(UserError, match="recipes are numbers, pydocs, shakespeare, stdlib-code"):
        open_corpus("no/such/file.txt")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the refusal, because root may read everything."""
    path = written(tmp_path, "a.txt", b"secret")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        documents(path)
