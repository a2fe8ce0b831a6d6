"""`train.py --data` says when validation has documents that are trained on, and only then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitransformer.commands.train import main
from minitransformer.text.corpora import PIECE, open_corpus
from minitransformer.text.datasets.text import PreparedText, TextPreparation
from minitransformer.text.tokenizers import Tokenizer
from tests.dirty_for_tests import real_texts, write_jsonl
from tests.runs_for_tests import SMALL

TEXTS = real_texts(40, 40)


def prepared(train: Path, validation: Path | None, cache: Path) -> PreparedText:
    given = None if validation is None else open_corpus(str(validation))
    preparation = TextPreparation(
        open_corpus(str(train)),
        Tokenizer.choose("bytes"),
        context_length=16,
        validation=given,
        cache=cache,
        progress=False,
    )
    return preparation.run()


def test_documents_of_a_validation_file_that_are_trained_on_are_counted_and_said(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS[:30])
    validation = write_jsonl(tmp_path / "val.jsonl", [*TEXTS[30:], *TEXTS[:3], "x" * 3 * PIECE])
    for _ in range(2):  # written, then opened from the cache
        data = prepared(train, validation, tmp_path / "cache")
        assert data.shared_documents == 3
        assert "warning    3 of 14 validation documents are trained on" in data.summary()
        assert max(map(len, data.summary().splitlines())) < 80


@pytest.mark.parametrize("split", ["given", "documents", "contiguous"])
def test_no_warning_where_nothing_is_shared(split: str, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS if split == "documents" else TEXTS[:1])
    validation = write_jsonl(tmp_path / "val.jsonl", [f"{text} indeed" for text in TEXTS]) if split == "given" else None
    data = prepared(train, validation, tmp_path / "cache")
    assert data.split == split
    assert data.shared_documents == 0
    assert "warning" not in data.summary()


def test_repeated_documents_are_shared_where_a_text_is_split_at_one_position(tmp_path: Path) -> None:
    texts = [TEXTS[0], *[TEXTS[1]] * 20]
    data = prepared(write_jsonl(tmp_path / "train.jsonl", texts), None, tmp_path / "cache")
    assert data.split == "contiguous"
    assert data.shared_documents >= 1


def test_a_long_document_is_shared_only_as_a_whole(tmp_path: Path) -> None:
    long = "".join(f"{number} " for number in range(PIECE // 3))
    train = write_jsonl(tmp_path / "train.jsonl", [long])
    other = write_jsonl(tmp_path / "other.jsonl", [long[:-2] + "! "])
    assert len(long) > PIECE
    assert prepared(train, other, tmp_path / "cache").shared_documents == 0
    (tmp_path / "same.jsonl").write_text(train.read_text())
    assert prepared(train, tmp_path / "same.jsonl", tmp_path / "cache").shared_documents == 1


@pytest.mark.unchecked_shapes
def test_train_says_so_for_text_and_for_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    write_jsonl(tmp_path / "train.jsonl", TEXTS[:30])
    write_jsonl(tmp_path / "val.jsonl", TEXTS[25:])
    flags = ["--data", "train.jsonl", "--validation-data", "val.jsonl", "--steps", "1"]
    assert main(["gpt-nano", *flags, *SMALL]) == 0
    assert "warning    5 of 15 validation documents are trained on" in capsys.readouterr().out
    for name, texts in (("train", TEXTS[:30]), ("val", TEXTS[25:])):
        rows = [json.dumps({"text": text, "label": "ab"[len(text) % 2]}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    assert main(["bert-mini", "--objective", "classify", *flags, *SMALL]) == 0
    assert "warning    5 of 15 validation texts are trained on" in capsys.readouterr().out
