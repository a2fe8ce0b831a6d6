"""Files that a command would write at the end are refused before its work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minitransformer.commands import check_outputs, compare, compress, drift, embed, evaluate, feedback, look
from minitransformer.errors import UserError
from tests.runs_for_tests import Call


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (evaluate, ["run", "--json"]),
        (evaluate, ["run", "--html"]),
        (evaluate, ["run", "--out"]),
        (drift, ["run", "--log", "log.jsonl", "--json"]),
        (embed, ["run", "--out"]),
        (feedback, ["run", "--to"]),
        (compare, ["run", "--csv"]),
        (compress, ["run", "--out", "new", "--plot"]),
        (look, ["run", "--prompt", "x", "--out"]),
    ],
)
def test_a_file_below_a_file_is_refused_before_the_run_is_opened(
    command: object, flags: list[str], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    suffix = {"--plot": ".png", "--to": ".jsonl", "--out": ".jsonl"}.get(flags[-1], "")
    code, _, err = call(command, *flags, f"file/below{suffix}")
    assert (code, err) == (
        2,
        f"error: file/below{suffix} cannot be written, as file is no folder: choose another {flags[-1]}\n",
    )


def test_outputs_are_new_writable_and_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, new = tmp_path / "there", tmp_path / "new/deep.json"
    there.write_text("")
    check_outputs({"--json": new, "--html": None})
    check_outputs({"--csv": there}, new=False)
    for outputs, said in (
        ({"--json": there}, "there already exists: choose another --json"),
        ({"--json": new, "--html": new}, "deep.json is named twice: choose another --html"),
    ):
        with pytest.raises(UserError, match=said):
            check_outputs(outputs)
    with pytest.raises(UserError, match="cannot be written, as it is a folder: choose another --csv"):
        check_outputs({"--csv": tmp_path}, new=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is read-only: choose another --json"):
        check_outputs({"--json": new})
