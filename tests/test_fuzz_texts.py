"""Text of every kind is prepared, trained on and continued, or refused in one sentence; nothing is half-written."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import strategies as st

from minitransformer.commands import sample
from minitransformer.commands.train import main as train_main
from minitransformer.runs import Run
from tests.fuzz_for_tests import any_texts, cases, for_cases, pieces, texts
from tests.runs_for_tests import SMALL

pytestmark = pytest.mark.unchecked_shapes
FLAGS = [flag for flag in SMALL if flag not in ("--tokenizer", "bytes")] + ["--validation-fraction", "0.001"]
long_texts = st.builds(
    lambda parts, times, end: "".join(parts) * times + end,
    st.lists(pieces, min_size=1, max_size=9),
    st.integers(1, 999),
    texts,
)
"""of some hundreds of kilobytes at most"""
contents = st.one_of(
    texts.map(str.encode),
    *[long_texts.map(str.encode)] * 4,
    st.binary(max_size=300),
    st.sampled_from([b"", b"a", b"\xff\xfe", b"\xef\xbb\xbf", b"\0" * 1000, b"\n" * 1000, b"\xed\xa0\x80" * 100]),
)


def called(main: object, *arguments: str) -> tuple[int, str, str]:
    """The exit code of a command, its output and its notes; a failure is one sentence."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(arguments))  # type: ignore[operator]
    assert code in (0, 1, 2), err.getvalue()
    assert (code == 0) == (not [line for line in err.getvalue().splitlines() if line.startswith("error: ")])
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


def train_and_sample(folder: Path, name: str, content: bytes, tokenizer: str, prompt: str) -> None:
    text, run = folder / name, folder / "run"
    text.write_bytes(content)
    before = {path.name for path in folder.iterdir()}
    code, *_ = called(
        train_main, "--data", str(text), "--out", str(run), "--steps", "1", "--tokenizer", tokenizer, *FLAGS
    )
    assert text.read_bytes() == content
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]
    assert {path.name for path in folder.iterdir()} - before <= {"work", "run"}
    if code:
        assert not run.exists()
        return
    assert Run.open(run).load_model().num_parameters()
    assert all(json.loads(line)["step"] == 1 for line in (run / "metrics.jsonl").read_text().splitlines())
    called(sample.main, str(run), "--max-new-tokens", "3", f"--prompt={prompt}")


@cases(3, 60)
def test_any_text_is_trained_on_and_continued_or_refused(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def check(content: bytes, name: str, tokenizer: str, prompt: str) -> None:
        with TemporaryDirectory() as folder:
            monkeypatch.setenv("MINITRANSFORMER_DATA", str(Path(folder, "work")))
            train_and_sample(Path(folder), name, content, tokenizer, prompt)

    names = st.sampled_from(["a.txt", "a.txt", "a.jsonl", "a.csv", "a.py"])
    for_cases(count, check, contents, names, st.sampled_from(["bytes", "chars", "bpe"]), any_texts)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "chars"])
@pytest.mark.parametrize(
    "text", ["e" + "\u0301" * 2_000_000, " " * 3_000_000 + "x", "\0" * 2_000_000, "\r\n" * 1_000_000]
)
def test_megabytes_of_one_character_are_trained_on_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, tokenizer: str
) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "work"))
    train_and_sample(tmp_path, "a.txt", text.encode(), tokenizer, "e\u0301")
