"""Mistakes in cleaning: each is one sentence that says what is wrong, with which value, and what to do."""

from pathlib import Path
from typing import Any

import pytest

from minitransformer.errors import UserError
from minitransformer.text.cleaning import formats, verdicts
from minitransformer.text.cleaning.config import CleaningConfig
from minitransformer.text.cleaning.writing import check_out
from tests.dirty_for_tests import cleaned, judged, real_texts, write_jsonl

TEXTS = real_texts(20, 40)


@pytest.fixture(autouse=True)
def own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path_factory.mktemp("work")))


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"unit": "word"}, "unknown unit 'word'"),
        ({"duplicates": "close"}, "unknown search for duplicates 'close'"),
        ({"normalise": ("nfd",)}, "unknown normalisation 'nfd': did you mean 'nfc'"),
        ({"normalise": ("nfc", "nfkc")}, "choose one of them"),
        ({"mask": ("mail",)}, "unknown kind of personal data 'mail'"),
        ({"alike": 1.0}, "alike is 1.0: it must be at least 0.5 and below 1"),
        ({"leak_words": 0}, "leak_words is 0: it must be at least 1"),
    ],
)
def test_a_choice_that_cannot_be_used_is_one_sentence(choices: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CleaningConfig(**choices)


@pytest.mark.parametrize(
    ("name", "content", "choices", "sentence"),
    [
        (
            "in.jsonl",
            '{"text": "a"}\n{"body": "b"}\n',
            {},
            "in.jsonl line 2 has no field 'text': its strings are 'body'",
        ),
        ("in.jsonl", '{"text": "a"}\n{"text"\n', {}, "in.jsonl line 2 is not JSON"),
        ("in.jsonl", '{"text": 5}\n', {}, "line 1 has a field 'text' that is not a string"),
        ("in.csv", "id,body\n1,a\n", {}, "in.csv has no column 'text': its first line names 'id', 'body'"),
        ("in.csv", "id,text\n1\n", {}, "line 2 has 1 values"),
        ("in.json", "[]", {}, "in.json is a JSON array: write one object a line, as .jsonl"),
        ("in.txt", "a\0b", {}, "NUL bytes"),
        ("in.txt", "", {}, "in.txt is empty"),
        ("in.jsonl", '{"text": "a"}\n', {"unit": "line"}, "--unit line is for plain text"),
        ("in.txt", "a", {"against": ("nowhere.txt",)}, "no file, folder or recipe 'nowhere.txt'"),
    ],
)
def test_data_that_cannot_be_read_are_one_sentence(
    name: str, content: str, choices: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        judged(tmp_path / name, **choices)


def test_a_mistake_in_a_process_is_the_same_sentence(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(UserError, match="line 2 has no field 'text'"):
        judged(tmp_path / "in.jsonl", workers=2)


def test_a_text_that_is_one_huge_document_is_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MOST", 100)
    (tmp_path / "in.txt").write_text("a word\n" * 30)
    with pytest.raises(UserError, match="clean it by --unit paragraph or --unit line"):
        judged(tmp_path / "in.txt")


def test_what_is_held_out_cannot_be_cleaned_too(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(UserError, match="is to be cleaned, and held out by --against"):
        judged(path, against=(str(path),))


def test_an_output_folder_with_other_files_or_in_the_input_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in/a.jsonl", TEXTS)
    job, _ = judged(tmp_path / "in")
    for out, sentence in (
        (tmp_path / "in/out", "whose files are read"),
        (tmp_path / "in", "whose files are read"),
        (path, "is in|is a file"),
        (tmp_path, "holds other files"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_out(out, job)
    cleaned(tmp_path / "out", tmp_path / "in", mask=("email",))
    with pytest.raises(UserError, match="holds other files"):
        check_out(tmp_path / "out", job)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    examine = verdicts.examine_block

    def change(*arguments: Any) -> Any:
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
        return examine(*arguments)

    monkeypatch.setattr(verdicts, "examine_block", change)
    with pytest.raises(UserError, match="changed while it was read"):
        judged(path)
