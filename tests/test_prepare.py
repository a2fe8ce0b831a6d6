"""Preparation: the same text always gives the same two files, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import UserError
from minitransformer.text import corpora
from minitransformer.text.corpora import Corpus, Piece, open_corpus
from minitransformer.text.datasets import pipeline
from minitransformer.text.datasets import text as text_data
from minitransformer.text.datasets.pipeline import sample
from minitransformer.text.datasets.text import TextPreparation, by_document, contiguous, is_validation
from minitransformer.text.threads import AHEAD, in_order
from minitransformer.text.tokenizers import BPE, Bytes
from tests.prepared_for_tests import contents, documents, made, stories, written

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare.txt of shared/data")
def test_characters_of_tiny_shakespeare_split_as_in_nanogpt() -> None:
    prepared = made(open_corpus(str(SHAKESPEARE)), "chars", context_length=256)
    text = SHAKESPEARE.read_text()
    first, second = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]
    assert (len(first), len(second), len(set(text))) == (1_003_854, 111_540, 65)
    assert prepared.tokenizer.vocab_size == 65 + 1
    assert documents(prepared, prepared.train) == [first]
    assert documents(prepared, prepared.validation) == [second]
    assert (prepared.train_bytes, prepared.validation_bytes) == (1_003_854, 111_540)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "chars"])
def test_every_document_goes_whole_to_the_side_that_its_hash_says(tmp_path: Path, tokenizer: str) -> None:
    texts = stories(300)
    prepared = made(written(tmp_path / "a.jsonl", texts), tokenizer, vocab_size=300)
    assert prepared.split == "documents"
    assert documents(prepared, prepared.train) == [text for text in texts if not is_validation(text, 0.1)]
    assert documents(prepared, prepared.validation) == [text for text in texts if is_validation(text, 0.1)]
    assert prepared.train_documents + prepared.validation_documents == 300
    assert prepared.validation_bytes == sum(len(text.encode()) for text in texts if is_validation(text, 0.1))
    assert prepared.train_bytes + prepared.validation_bytes == sum(map(len, texts))
    assert (prepared.train.dtype, type(prepared.train)) == (np.uint16, np.memmap)
    assert f"{len(prepared.train):,}" in prepared.summary()


def test_a_side_depends_neither_on_order_nor_on_repetition(tmp_path: Path) -> None:
    texts = stories(200)
    first = made(written(tmp_path / "a.jsonl", texts))
    second = made(written(tmp_path / "b.jsonl", texts[::-1] + texts[::2]))
    assert set(documents(first, first.validation)) == set(documents(second, second.validation))
    assert not set(documents(second, second.validation)) & set(documents(second, second.train))


@given(texts=st.lists(st.text(min_size=1), min_size=1), share=st.floats(0, 1))
def test_a_contiguous_split_loses_nothing_and_opens_both_sides(texts: list[str], share: float) -> None:
    place = int(len("".join(texts)) * share)
    parts = list(contiguous([Piece(text, i % 2 == 0) for i, text in enumerate(texts)], place))
    train = [part for part in parts if not part.validation]
    validation = [part for part in parts if part.validation]
    assert "".join(part.text for part in train) == "".join(texts)[:place]
    assert "".join(part.text for part in validation) == "".join(texts)[place:]
    assert all(side[0].opens for side in (train, validation) if side)


@given(texts=st.lists(st.tuples(st.text(min_size=1), st.booleans())))
def test_pieces_of_a_document_stay_together(texts: list[tuple[str, bool]]) -> None:
    pieces = [Piece(text, opens or i == 0) for i, (text, opens) in enumerate(texts)]
    parts = list(by_document(pieces, 0.5))
    assert [(part.text, part.opens) for part in parts] == pieces
    for before, part in pairwise(parts):
        assert part.validation == (is_validation(part.text, 0.5) if part.opens else before.validation)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_documents_are_split_in_one_place(tmp_path: Path, count: int) -> None:
    texts = ["same " * 100] * count
    prepared = made(written(tmp_path / "a.jsonl", texts))
    assert prepared.split == "contiguous"
    whole = "".join(texts)
    assert "".join(documents(prepared, prepared.train)) == whole[: int(len(whole) * 0.9)]


def test_a_longer_context_than_the_validation_documents_hold_splits_in_one_place(tmp_path: Path) -> None:
    texts = [f"{i:04d}" for i in range(2000)]
    corpus = written(tmp_path / "a.jsonl", texts)
    short = made(corpus, validation_fraction=0.5, context_length=16)
    shares = [len(short.train), len(short.validation)]
    assert short.split == "documents"
    between = made(corpus, validation_fraction=0.5, context_length=min(shares))
    assert between.split == "contiguous" or min(shares) == max(shares)


def test_a_text_without_one_window_is_refused_with_both_numbers(tmp_path: Path) -> None:
    corpus = written(tmp_path / "a.jsonl", ["a" * 100])
    made(corpus, context_length=10)
    with pytest.raises(
        UserError, match=r"train has 91 tokens and validation 11, but one window needs 12 .*context-length"
    ):
        made(corpus, context_length=11)
    with pytest.raises(UserError, match="train has 0 tokens and validation 2"):
        made(written(tmp_path / "b.jsonl", ["a"]))


@pytest.mark.parametrize("fraction", [1, -1, 3, float("nan")])
def test_a_fraction_outside_zero_and_one_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError, match="validation_fraction"):
        made(written(tmp_path / "a.jsonl", stories(3)), validation_fraction=fraction)


@pytest.mark.parametrize("tokenizer", ["bytes", BPE.train(iter(stories(9)), 280)])
def test_too_small_a_vocabulary_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="vocabulary too small"):
        made(written(tmp_path / "a.jsonl", stories(30)), tokenizer, vocab_size=100)


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "chars"])
def test_one_core_and_many_write_identical_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, suffix: str
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 100)
    path = tmp_path / f"a.{suffix}"
    corpus = written(path, stories(100))
    one = made(corpus, tokenizer, workers=1, cache=tmp_path / "one")
    many = made(corpus, tokenizer, workers=5, cache=tmp_path / "many")
    assert contents(one.folder) == contents(many.folder)
    assert one.folder.name == many.folder.name


def test_a_file_encoded_in_pieces_is_the_file_encoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 50)
    text = "".join(stories(100))
    (tmp_path / "a.txt").write_text(text)
    prepared = made(open_corpus(str(tmp_path / "a.txt")), "bpe", vocab_size=400)
    assert prepared.train[1:].tolist() == prepared.tokenizer.encode(text[: int(len(text) * 0.9)])


def test_many_ids_need_wider_tokens(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    prepared = made(written(tmp_path / "a.jsonl", [text]), "chars")
    assert prepared.train.dtype == np.uint32
    assert documents(prepared, prepared.train) == [text[:63_000]]


def test_a_second_start_reads_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = written(tmp_path / "a.jsonl", stories(50))
    first = made(corpus, "bpe", vocab_size=300)
    monkeypatch.setattr(Corpus, "pieces", None)
    assert contents(made(corpus, "bpe", vocab_size=300).folder) == contents(first.folder)


def test_other_text_settings_or_tokenizers_are_prepared_anew_and_a_moved_file_is_not(tmp_path: Path) -> None:
    corpus = written(tmp_path / "a.jsonl", stories(50))
    folders = {made(corpus, **settings).folder for settings in (
        {}, {"validation_fraction": 0.2}, {"tokenizer": "chars"}, {"tokenizer": "bpe", "vocab_size": 300},
    )}  # fmt: skip
    assert len(folders) == 4
    assert made(corpus, tokenizer=Bytes()).folder == made(corpus, tokenizer="bytes").folder
    assert made(written(tmp_path / "b.jsonl", stories(50))).folder == made(corpus).folder
    changed = stories(50)
    changed[7] = changed[7].replace("owls", "cows")
    assert made(written(tmp_path / "a.jsonl", changed)).folder not in folders


@given(texts=st.lists(st.text(max_size=200)), share=st.floats(0.01, 1))
def test_a_sample_has_its_share_of_every_beginning(texts: list[str], share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "STRETCH", 10)
        taken = list(sample(texts, share))
        assert taken == list(sample(texts, share))
    total = sum(map(len, texts))
    assert total * share - 10 <= sum(map(len, taken)) <= total * share


def test_bpe_is_fitted_to_a_sample_of_a_large_corpus_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[int] = []

    def train(texts: Iterator[str], vocab_size: int) -> BPE:
        heard.extend(map(len, texts))
        return BPE([bytes([value]) for value in range(256)])

    monkeypatch.setattr(BPE, "fit_limit", 20_000)
    monkeypatch.setattr(BPE, "train", train)
    monkeypatch.setattr(pipeline, "STRETCH", 100)
    corpus = written(tmp_path / "a.jsonl", stories(500))
    made(corpus, "bpe", progress=True)
    assert 19_000 < sum(heard) <= 20_000
    assert "even sample" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "most"), [(AHEAD, 3), (AHEAD // 10, 30), (0, 100)])
def test_working_ahead_keeps_the_order_and_stays_near(size: int, most: int) -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            begun.append(i)
            yield i

    for count, result in enumerate(in_order(lambda i: i * i, items(), workers=3, size=lambda item: size)):
        assert result == count**2
        assert min(100, count + most) <= len(begun) <= count + most + 3


def test_validation_of_its_own_is_all_of_its_files_and_training_all_of_the_others(tmp_path: Path) -> None:
    texts, held_out = stories(60), [f"Another tale, of {i} cats.\n" for i in range(9)]
    validation = written(tmp_path / "b.jsonl", held_out)
    prepared = made(written(tmp_path / "a.jsonl", texts), validation=validation)
    assert prepared.split == "given"
    assert documents(prepared, prepared.train) == texts
    assert documents(prepared, prepared.validation) == held_out
    assert (prepared.train_documents, prepared.validation_documents) == (60, 9)
    assert prepared.validation_bytes == sum(map(len, held_out))
    assert "separate files" in prepared.summary()


@pytest.mark.parametrize("tokenizer", ["chars", "bpe"])
def test_a_tokenizer_is_fitted_to_validation_of_its_own_too(tmp_path: Path, tokenizer: str) -> None:
    validation = written(tmp_path / "b.jsonl", ["жук и паук " * 20])
    prepared = made(written(tmp_path / "a.jsonl", stories(50)), tokenizer, vocab_size=400, validation=validation)
    assert documents(prepared, prepared.validation) == ["жук и паук " * 20]


def test_a_file_on_both_sides_is_refused(tmp_path: Path) -> None:
    corpus = written(tmp_path / "a.jsonl", stories(50))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="is in --data and in --validation-data"):
        made(corpus, validation=open_corpus(str(tmp_path / "link.jsonl")))


def test_without_validation_everything_trains(tmp_path: Path) -> None:
    texts = stories(40)
    prepared = made(written(tmp_path / "a.jsonl", texts), validation_fraction=0.0)
    assert prepared.split == "none"
    assert documents(prepared, prepared.train) == texts
    assert (len(prepared.validation), prepared.validation_documents, prepared.validation_bytes) == (0, 0, 0)
    assert "validation none" in prepared.summary()
    with pytest.raises(UserError, match=r"too short: train has \d+ tokens, but one window needs 100001:"):
        made(written(tmp_path / "a.jsonl", texts), validation_fraction=0.0, context_length=100_000)


def test_fields_sources_and_validation_make_folders_of_their_own(tmp_path: Path) -> None:
    for name, word in (("a", "owl"), ("b", "cat"), ("c", "dog")):
        lines = [{"text": f"{word} {i} " * 9, "body": f"{i} {word}s " * 9} for i in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    folders = [
        made(open_corpus(a)).folder,
        made(open_corpus(a, "body")).folder,
        made(open_corpus([a, b])).folder,
        made(open_corpus([b, a])).folder,
        made(open_corpus(a), validation=open_corpus(b)).folder,
        made(open_corpus(a), validation=open_corpus(c)).folder,
        made(open_corpus(a), validation=open_corpus(b, "body")).folder,
        made(open_corpus(a), validation_fraction=0.0).folder,
    ]
    assert len(set(folders)) == len(folders)
    # With files of its own, the fraction has no say.
    assert made(open_corpus(a), validation=open_corpus(b), validation_fraction=0.3).folder == folders[4]


def test_a_table_that_was_once_scanned_as_text_is_scanned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f"{i},a story of {i} owls\n" for i in range(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_data, "TABLES", set())
        patch.setattr(corpora, "DELIMITERS", {})
        before = made(open_corpus(str(path)))
    after = made(open_corpus(str(path)))
    assert before.split == "contiguous"
    assert after.folder != before.folder
    assert after.train_documents + after.validation_documents == 200


def test_files_of_a_folder_that_are_left_out_are_counted(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("some text " * 100)
    (folder / "b.csv").write_text("text\nmore text\n")
    TextPreparation(open_corpus(str(folder)), Bytes.choose(), context_length=8, cache=tmp_path / "cache").run()
    assert "1 of its files without a text suffix are left out" in capsys.readouterr().err
