"""`minitransformer data report` and `clean`: tables, JSON, pages, and flags that go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitransformer.commands import data
from tests.dirty_for_tests import read_texts, real_texts, write_jsonl
from tests.runs_for_tests import Call

TEXTS = real_texts(20, 40)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    write_jsonl(tmp_path / "my.jsonl", [*TEXTS, TEXTS[3], f"write to a@b.org {TEXTS[4][:60]}", "short"])
    write_jsonl(tmp_path / "val.jsonl", TEXTS[:2])


def test_a_report_says_as_table_json_and_page_what_cleaning_removes(tmp_path: Path, call: Call) -> None:
    flags = ["--against", "val.jsonl", "--rules", "length", "--mask", "email", "--workers", "1"]
    code, out, err = call(data, "report", "my.jsonl", *flags, "--json", "r.json", "--html", "r.html")
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["before"]["documents"] == 23
    assert found["after"]["documents"] == 19
    assert {each["reason"]: each["documents"] for each in found["removed"]} == {
        **{"exact duplicate": 1, "shared with held-out text": 2, "length": 1}
    }
    assert [each for each in found["personal"] if each["found"]] == [
        {"kind": "email", "found": 1, "documents": 1, "documents_kept": 1, "masked": True}
    ]
    page = (tmp_path / "r.html").read_text()
    for text in ("shared with held-out text", "Personal data", "Scripts", "Held-out documents"):
        assert text in page
        assert text in out
    code, out_of_clean, err = call(data, "clean", "my.jsonl", *flags, "--out", "cleaned")
    assert code == 0, err
    assert out_of_clean.startswith(out.strip())
    assert json.loads((tmp_path / "cleaned/report.json").read_text()) == found
    assert read_texts(tmp_path / "cleaned/my.jsonl") == [*TEXTS[2:], f"write to <EMAIL> {TEXTS[4][:60]}"]
    assert "Examples of what was removed" in (tmp_path / "cleaned/report.html").read_text()


def test_tokens_per_byte_are_those_of_the_tokenizer(tmp_path: Path, call: Call) -> None:
    from minitransformer.text.tokenizers import Tokenizer

    Tokenizer.choose("bytes").variant.fit(Tokenizer.choose("bytes").settings, lambda: iter(())).save(Path("tok.json"))
    code, out, err = call(data, "report", "my.jsonl", "--tokenizer", "tok.json", "--workers", "1")
    assert code == 0, err
    assert [line.split() for line in out.splitlines() if line.startswith("tokens")] == [
        ["tokens", "per", "byte", "1.0000", "–", "–"]
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "data report needs data"),
        ("my.jsonl --out x", "--out is for clean"),
        ("my.jsonl --alike 0.9", "--alike is for near duplicates, and --duplicates is exact"),
        ("my.jsonl --leak-words 8", "--leak-words is for held-out text"),
        ("my.jsonl --length-least 3", "--length-least is for the quality rule length: add it to --rules"),
        ("my.jsonl --rules lenght", "unknown quality rule 'lenght': did you mean 'length'"),
        ("my.jsonl --rules length --length-least -1", "length_least is -1: it must be at least 0"),
        ("my.jsonl --rules word-list", "name a text file with --word-list-file"),
        ("my.jsonl --workers 0", "workers is 0"),
        ("my.jsonl --normalise off nfc", "unknown normalisation 'off'"),
        ("nothing.jsonl", "no file, folder or recipe 'nothing.jsonl'"),
        ("my.jsonl --field body", "line 1 has no field 'body'"),
        ("my.jsonl --tokenizer nowhere.json", "nowhere.json"),
        ("my.jsonl --dedupe", "dedupe"),
    ],
)
def test_a_mistake_is_one_sentence(flags: str, sentence: str, call: Call) -> None:
    code, _, err = call(data, "report", *flags.split(), *([] if "--workers" in flags else ["--workers", "1"]))
    assert code in (1, 2)
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("clean my.jsonl", "clean needs a new folder: name one with --out"),
        ("clean my.jsonl --out x --json y", "--json and --html are for report"),
        ("cleen my.jsonl", "unknown task of data 'cleen': did you mean 'clean'"),
    ],
)
def test_each_task_takes_its_own_flags(flags: str, sentence: str, call: Call) -> None:
    code, _, err = call(data, *flags.split())
    assert code == 2
    assert sentence in err


def test_help_names_tasks_rules_and_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data.main(["--help"])
    assert "data report|clean PATH" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.main(["clean", "--help"])
    shown = capsys.readouterr().out
    for name in ("repetition", "--word-list-file", "email", "mojibake", "paragraph"):
        assert name in shown
