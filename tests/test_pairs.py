"""Pairs: the same text in three forms gives the same pairs, and each is in one split, whole, once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.text.datasets.pair_data import PreparedPairs
from minitransformer.text.datasets.pair_preparation import EncodedPair, PairPreparation, divided
from minitransformer.text.pairs import PairCorpus, open_pairs
from minitransformer.text.token_files import Ragged, TokenPairs
from minitransformer.text.tokenizers import BPE, Tokenizer
from tests.prepared_for_tests import fitted

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
        ("a.txt", b"un\tone\n", r"a\.txt alone has no pairs: .*--target-data"),
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


# --- prepared


def sums(count: int) -> list[tuple[str, str]]:
    return [(f"{i} und {i * i} sind wie viel?", f"{i + i * i} µ") for i in range(count)]


def made(tmp_path: Path, pairs: list[tuple[str, str]], tokenizer: Any = "bytes", **settings: Any) -> PreparedPairs:
    corpus = open_pairs(put(tmp_path / "a.tsv", as_table(pairs)))
    tokenizer = Tokenizer.choose(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return PairPreparation(corpus, tokenizer, **{"context_length": 64, "progress": False, **settings}).run()


def decoded(prepared: PreparedPairs, pairs: TokenPairs) -> list[tuple[str, str]]:
    def texts(side: Ragged, tokenizer: Tokenizer) -> list[str]:
        return [tokenizer.decode(side[i].tolist()) for i in range(len(side))]

    sources, targets = texts(pairs.sources, prepared.tokenizer), texts(pairs.targets, prepared.target_tokenizer)
    return list(zip(sources, targets, strict=True))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "chars"])
def test_every_pair_is_in_one_split_and_decodes_to_itself(tmp_path: Path, tokenizer: str, separate: bool) -> None:
    pairs = sums(3000)
    prepared = made(tmp_path, pairs, tokenizer, vocab_size=280, separate=separate)
    train, validation = decoded(prepared, prepared.train), decoded(prepared, prepared.validation)
    assert sorted(train + validation) == sorted(pairs)
    assert 200 < len(validation) < 400
    assert prepared.num_bytes("validation") == sum(len(target.encode()) for _, target in validation)
    assert (prepared.tokenizer is prepared.target_tokenizer) == (not separate)
    assert isinstance(prepared.train.sources.tokens, np.memmap)
    assert f"{len(train):,} pairs" in prepared.summary()
    assert max(map(len, prepared.summary().splitlines())) < 80


def test_separate_tokenizers_know_their_own_side_only(tmp_path: Path) -> None:
    prepared = made(tmp_path, [("ab", "cd"), ("ba", "dc"), ("aa", "cc")], "chars", separate=True)
    assert prepared.tokenizer.pieces[:2] == [b"a", b"b"]
    assert prepared.target_tokenizer.pieces[:2] == [b"c", b"d"]
    assert made(tmp_path, [("ab", "cd"), ("ba", "dc"), ("aa", "cc")], "chars").tokenizer.vocab_size == 5


def test_both_sides_are_in_a_sample_that_a_tokenizer_is_fitted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(f"katze{i} " * 5, f"gatto{i} " * 5) for i in range(1000)]
    monkeypatch.setattr(BPE, "fit_limit", 30_000)
    prepared = made(tmp_path, pairs, "bpe", vocab_size=300)
    assert {b"katze", b"gatto"} <= {piece.strip() for piece in prepared.tokenizer.pieces}


def test_what_was_prepared_before_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path, sums(50), "bpe", vocab_size=270)
    monkeypatch.setattr(BPE, "encode_array", None)
    again = made(tmp_path, sums(50), "bpe", vocab_size=270)
    assert again.folder == first.folder
    assert decoded(again, again.train) == decoded(first, first.train)


@pytest.mark.parametrize("settings", [{"context_length": 65}, {"too_long": "cut"}, {"validation_fraction": 0.2}])
def test_other_settings_are_prepared_elsewhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert made(tmp_path, sums(50)).folder != made(tmp_path, sums(50), **settings).folder


def test_a_damaged_folder_is_made_again_and_a_failed_build_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    whole = made(tmp_path, sums(50))
    pairs = decoded(whole, whole.train)
    (whole.folder / "train-target.bin").write_bytes(b"")
    again = made(tmp_path, sums(50))
    assert decoded(again, again.train) == pairs
    with pytest.raises(UserError, match="not among the 2 of this chars tokenizer"):
        made(tmp_path, [("ab", "ab"), ("ab", "xx")], fitted("chars", "ab"))
    assert not list((work / "prepared").glob("*.partial"))


def test_a_side_must_leave_room_for_its_end_token(tmp_path: Path) -> None:
    pairs = [("x" * source, "y" * target) for source, target in [(1, 1), (2, 2), (9, 3), (3, 9), (10, 4), (4, 10)]]
    skipped = made(tmp_path, pairs, context_length=10)
    assert sorted(decoded(skipped, skipped.train) + decoded(skipped, skipped.validation)) == sorted(pairs[:4])
    assert (skipped.skipped, skipped.cut) == (2, 0)
    assert "2 pairs skipped" in skipped.summary()
    cut = made(tmp_path, pairs, context_length=10, too_long="cut")
    shortened = [*pairs[:4], ("x" * 9, "y" * 4), ("x" * 4, "y" * 9)]
    assert sorted(decoded(cut, cut.train) + decoded(cut, cut.validation)) == sorted(shortened)
    assert (cut.skipped, cut.cut) == (0, 2)
    assert cut.num_bytes("validation") == len(cut.validation.targets.tokens)


def test_a_corpus_for_validation_is_all_of_it(tmp_path: Path) -> None:
    other = open_pairs(put(tmp_path / "b.tsv", as_table(sums(7))))
    prepared = made(tmp_path, sums(50), validation=other)
    assert decoded(prepared, prepared.train) == sums(50)
    assert decoded(prepared, prepared.validation) == sums(7)


@given(places=st.lists(st.integers(0, 9), min_size=1), fraction=st.sampled_from([0.001, 0.1, 0.5]))
def test_validation_has_the_low_places_or_the_lowest_and_no_duplicate_is_on_both_sides(
    places: list[int], fraction: float
) -> None:
    pairs = [EncodedPair((place + 1) / 11, (np.empty(0, np.uint16),) * 2, False, 0) for place in places]
    parts = list(divided(pairs, fraction))
    assert sorted(pair.place for _, pair in parts) == sorted(pair.place for pair in pairs)
    limit = max(fraction, min(pair.place for pair in pairs) + 1e-9)
    assert all((split == "validation") == (pair.place < limit) for split, pair in parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 3}, r"leaves no pairs for train \(50 pairs, 50 of them too long for 3 tokens\)"),
        ({"too_long": "drop"}, "too_long is 'drop': choose 'skip' or 'cut'"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0"),
        ({"vocab_size": 100}, "vocabulary too small"),
    ],
)
def test_what_cannot_be_prepared_is_said(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, sums(50), **settings)


def test_a_ready_target_tokenizer_may_be_larger_than_that_of_the_sources(tmp_path: Path) -> None:
    source, target = (fitted("chars", text) for text in ("ab", "cdefg"))
    pairs = [("ab", "cd"), ("ba", "efg")]
    prepared = made(tmp_path, pairs, source, target_tokenizer=target, vocab_size=source.vocab_size)
    assert prepared.target_tokenizer is not prepared.tokenizer
    assert sorted(decoded(prepared, prepared.train) + decoded(prepared, prepared.validation)) == sorted(pairs)
