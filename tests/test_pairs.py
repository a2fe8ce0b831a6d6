"""Pairs: the same text in three forms gives the same pairs, and what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from minitransformer.errors import UserError
from minitransformer.text.pairs import PairCorpus, open_pairs

PAIRS = [("Un chat.", "A cat."), ("Où\u2028est-il ?", "Where is he?"), ("Là-bas\x0b!", "Over there!")]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    return tmp_path / "work"


def put(path: Path, content: bytes) -> str:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def as_table(pairs: list[tuple[str, str]]) -> bytes:
    return "".join(f"{source}\t{target}\n" for source, target in pairs).encode()


def read(corpus: PairCorpus) -> list[tuple[str, str]]:
    return list(corpus.pairs())


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_table_a_jsonl_and_two_files_hold_the_same_pairs(tmp_path: Path, packed: str) -> None:
    table = put(tmp_path / f"a.tsv{packed}", as_table(PAIRS))
    records = "".join(json.dumps({"fr": source, "en": target}) + "\n" for source, target in PAIRS)
    jsonl = put(tmp_path / f"a.jsonl{packed}", records.encode())
    sources, targets = (
        put(tmp_path / f"a.{language}{packed}", "\n".join(side).encode())
        for language, side in zip(("fr", "en"), zip(*PAIRS, strict=True), strict=True)
    )
    assert read(open_pairs(table)) == PAIRS
    assert read(open_pairs(jsonl, source_field="fr", target_field="en")) == PAIRS
    assert read(open_pairs(sources, targets)) == PAIRS


def test_lines_may_end_as_on_any_system_and_the_last_not_at_all(tmp_path: Path) -> None:
    sources, targets = put(tmp_path / "a", b"\xef\xbb\xbfun\r\ndeux\r\n"), put(tmp_path / "b", b"one\ntwo")
    assert read(open_pairs(sources, targets)) == [("un", "one"), ("deux", "two")]


def test_a_line_longer_than_what_is_read_at_once_stays_whole(tmp_path: Path) -> None:
    long = [("x" * 700_000, "y" * 300_000), ("a", "b")]
    assert read(open_pairs(put(tmp_path / "a.tsv", as_table(long)))) == long


def test_only_the_first_two_columns_of_a_table_count(tmp_path: Path) -> None:
    assert read(open_pairs(put(tmp_path / "a.tsv", b"un\tone\tby someone\twho\n"))) == [("un", "one")]


def test_pairs_with_a_blank_side_are_left_out_and_the_others_stay_together(tmp_path: Path) -> None:
    sources, targets = put(tmp_path / "a", b"un\n\ntrois\nquatre\n"), put(tmp_path / "b", b"one\ntwo\n \nfour\n")
    assert read(open_pairs(sources, targets)) == [("un", "one"), ("quatre", "four")]


def test_lowercase_is_for_both_sides(tmp_path: Path) -> None:
    corpus = open_pairs(put(tmp_path / "a.tsv", as_table(PAIRS)), lowercase=True)
    assert read(corpus) == [(source.lower(), target.lower()) for source, target in PAIRS]


@pytest.mark.parametrize("longer", ["a", "b"])
def test_files_of_different_length_are_refused_with_both_counts(tmp_path: Path, longer: str) -> None:
    for name in "ab":
        put(tmp_path / name, b"x\n" * (7 if name == longer else 4))
    counts = r"a has 7 lines and \S*b has 4:" if longer == "a" else r"a has 4 lines and \S*b has 7:"
    with pytest.raises(UserError, match=counts):
        read(open_pairs(str(tmp_path / "a"), str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"un\tone\n\ndeux two\n", r"a\.tsv line 3 has no tab"),
        ("a.tsv", b"un\tone\ndeux\t\xff\n", r"a\.tsv is not UTF-8 at byte 12 \(0xff\)"),
        ("a.jsonl", b'{"source": "un", "target": "one"}\n{"source": "deux"}\n', r"line 2 has no field 'target'"),
        ("a.jsonl", b'{"source": "un"\n', r"a\.jsonl line 1 is not JSON"),
        ("a.tsv", b"", r"a\.tsv is empty"),
        ("a.tsv", b" \t \n", r"a\.tsv is empty"),
        ("a.tsv.gz", b"", r"a\.tsv\.gz is empty"),
        ("a.txt", b"un\tone\n", r"a\.txt alone holds no pairs: .*--target-data"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read(open_pairs(path))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file 'nowhere\.tsv'"):
        open_pairs("nowhere.tsv")
    with pytest.raises(UserError, match=r"no file 'nowhere\.en'"):
        open_pairs(put(tmp_path / "a.fr", b"un\n"), "nowhere.en")


def test_the_signature_changes_when_a_file_does(tmp_path: Path) -> None:
    sources, targets = put(tmp_path / "a", b"un\n"), put(tmp_path / "b", b"one\n")
    before = open_pairs(sources, targets).signature()
    assert open_pairs(sources, targets).signature() == before
    put(tmp_path / "b", b"two!\n")
    assert open_pairs(sources, targets).signature() != before
