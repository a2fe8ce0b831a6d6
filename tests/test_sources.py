"""Corpora: whatever `--data` names streams in one order, whole, in bounded pieces; what is no text is named."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.text import corpora
from minitransformer.text.corpora import cut, open_corpus, short_name
from minitransformer.text.standard_input import without_standard_input


@pytest.fixture(autouse=True)
def _own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path_factory.mktemp("work")))


def documents(data: Path | str | list[str], field: str = "text") -> list[str]:
    found: list[str] = []
    for piece in open_corpus(data if isinstance(data, list) else str(data), field).pieces():
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
        ("a.txt.gz", gzip.compress(b"packed " * 999, mtime=0)[:-20], "truncated"),
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
    with pytest.raises(
        UserError, match="recipes are docs-qa, docs-tasks, docstrings, numbers, pydocs, shakespeare, stdlib-code"
    ):
        open_corpus("no/such/file.txt")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the refusal, because root may read everything."""
    path = written(tmp_path, "a.txt", b"secret")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        documents(path)


TEXTS = st.lists(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), max_size=8)


@given(texts=TEXTS, suffix=st.sampled_from(["csv", "tsv"]), size=st.integers(3, 50))
@settings(deadline=None)
def test_a_row_of_a_table_is_a_document(tmp_path_factory, texts: list[str], suffix: str, size: int) -> None:
    path = tmp_path_factory.mktemp("rows") / f"a.{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, "excel" if suffix == "csv" else "excel-tab")
        rows.writerow(["id", "body"])
        rows.writerows([str(i), text] for i, text in enumerate(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", size)
        assert documents(path, "body") == [text for text in texts if text]


@given(texts=TEXTS, indent=st.sampled_from([None, 2]), size=st.integers(3, 50))
@settings(deadline=None)
def test_an_object_of_an_array_is_a_document(tmp_path_factory, texts: list[str], indent: int | None, size: int) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps([{"n": [1, {}], "body": text} for text in texts], indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", size)
        assert documents(path, "body") == [text for text in texts if text]


def test_tables_may_be_packed_and_hold_long_texts(tmp_path: Path) -> None:
    long = "a long document, with separators\nand lines " * 10_000
    table = io.StringIO()
    csv.writer(table).writerows([["text"], [long]])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table.getvalue().encode()))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([{"text": long}]).encode()))
    assert documents(tmp_path / "a.csv.gz") == documents(tmp_path / "b.json.gz") == [long]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"title,body\na,b\n", "has no column 'text': its first line names 'title', 'body'; .*--field"),
        ("a.csv", b"text,text\na,b\n", "has 2 columns 'text'"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3 has 1 values, and its first line names 2 columns"),
        ("a.csv", b"id,text\n1,a, b\n", "line 2 has 3 values"),
        ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', "line 5 cannot be read"),
        ("a.tsv", b"id\ttext\n1\ta\n2\n", "line 3 has 1 values"),
        ("a.csv", b"id,text\n1,caf\xe9\n", r"not UTF-8 at byte 13 \(0xe9\)"),
        ("a.json", b"", "is empty"),
        ("a.json", b"  ", "is not a JSON array of objects"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "is not a JSON array of objects: .*rename it to .jsonl"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "element 2 has no field 'text': its strings are 'body'"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', "element 2 has a field 'text' that is not a string"),
        ("a.json", b'[{"text": "a"}, "b"]', "element 2 is not an object"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "element 1 is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "element 2 is not JSON"),
        ("a.json", b'[{"text": "a"}', "element 1 is not JSON"),
        ("a.json", b'[{"text": "a"}] []', "continues with"),
        ("a.json", b'[{"text": "\\ud800"}]', "element 1 holds half a surrogate pair"),
        ("a.json", b'[{"text": "a", "b": ' + b"[" * 200_000, "element 1 is not JSON .*deep"),
        ("a.json", b'[{"text": "caf\xe9"}]', "not UTF-8 at byte 14"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, "line 1 is not JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        documents(written(tmp_path, name, content))
    assert name in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow, .*pip install pyarrow, or convert it"):
        documents(written(tmp_path, "a.parquet", b"PAR1 and so on"))


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(3000)] + ["", "last"]
    parquet.write_table(arrow.table({"n": range(len(texts)), "body": texts}), path, row_group_size=700)
    assert documents(path, "body") == [text for text in texts if text]
    heard: list[int] = []
    corpus = open_corpus(str(path), "body")
    list(corpus.pieces(heard.append))
    assert sum(heard) == corpus.size
    with pytest.raises(UserError, match="has no column 'text': it has 'n', 'body'"):
        documents(path)
    with pytest.raises(UserError, match="row 1 has a field 'n' that is not a string"):
        documents(path, "n")
    parquet.write_table(arrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match="row 2 has no field 'text'"):
        documents(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="is not a complete Parquet file"):
        documents(path)


def test_several_sources_are_read_in_their_order_and_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.txt", "a.txt", "more/c.txt", "more/d.log"):
        (tmp_path / name).write_text(name)
    jsonl(tmp_path / "e.jsonl", {"text": "e1"}, {"text": "e2"})
    sources = [str(tmp_path / name) for name in ("b.txt", "more", "*.txt", "e.jsonl")]
    assert documents(sources) == ["b.txt", "more/c.txt", "a.txt", "e1", "e2"]
    corpus = open_corpus(sources)
    assert corpus.skipped == 1
    assert open_corpus(sources[::-1]).signature() != corpus.signature()


def test_one_missing_or_empty_source_among_several_is_named(tmp_path: Path) -> None:
    whole, empty = written(tmp_path, "a.txt", b"text"), written(tmp_path, "b.txt", b"")
    with pytest.raises(UserError, match=r"b\.txt is empty"):
        open_corpus([whole, empty])
    with pytest.raises(UserError, match=r"no file, folder or recipe '.*c\.txt'"):
        open_corpus([whole, str(tmp_path / "c.txt")])


def test_a_field_of_what_has_no_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"--field is 'nope', and .* has no fields"):
        open_corpus(str(tmp_path / "a.txt"), "nope")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("my.txt", "my"),
        ("some/where/my.v2.txt", "my"),
        ("s.txt.gz", "s"),
        ("corpus/*.txt", "corpus"),
        ("part-*.jsonl", "part"),
        ("*", "data"),
        (("a.txt", "b.txt"), "a-and-1-more"),
        (("a.txt", "b.txt", "c.txt"), "a-and-2-more"),
    ],
)
def test_a_short_name_is_without_folders_and_endings(data: str | tuple[str, ...], name: str) -> None:
    assert short_name(data) == name


class Piped:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(("content", "suffix"), [(b"a text\n", ".txt"), (b'{"text": "a text\\n"}\n', ".jsonl")])
def test_standard_input_is_kept_under_a_name_of_its_content(
    monkeypatch: pytest.MonkeyPatch, content: bytes, suffix: str
) -> None:
    paths = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", Piped(content))
        paths.append(without_standard_input(("x.txt", "-")))
    assert paths[0] == paths[1]
    assert paths[0][0] == "x.txt"
    assert paths[0][1].endswith(suffix)
    assert documents(paths[0][1]) == ["a text\n"]
    assert {path.name for path in Path(paths[0][1]).parent.iterdir()} == {Path(paths[0][1]).name}
    assert without_standard_input("my.txt") == "my.txt"


def test_standard_input_that_is_empty_closed_or_asked_for_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(b" \n"))
    with pytest.raises(UserError, match="standard input is empty"):
        without_standard_input("-")
    with pytest.raises(UserError, match="can be read only once"):
        without_standard_input("-", "-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="closed"):
        without_standard_input("-")
