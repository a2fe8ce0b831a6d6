"""The fault campaign: what it finds on sound code, that it finds what is unsound, and how it says so."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minitransformer.commands import campaign as command
from minitransformer.commands.campaign import FaultTable, main
from minitransformer.reliability import faults
from minitransformer.reliability.campaign import FaultOutcome, can_disturb
from minitransformer.reliability.disturbed_runs import run_kinds
from minitransformer.reliability.faults import Fault, can_mount
from minitransformer.reliability.launcher import KILLED, Commands, Strike
from minitransformer.training.parallel import Parallel
from tests.forked_for_tests import forked_commands
from tests.starts_for_tests import one_of, with_traceback, without_checksums, without_moments

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def preloaded() -> None:
    """Commands of the campaign fork from the process that all tests share."""
    forked_commands()


def outcomes(capsys: Any, folder: Path, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*arguments, "--folder", str(folder), "--json"]) == code, capsys.readouterr().err
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_every_fault_leaves_a_run_equal_or_is_refused_in_one_sentence(tmp_path: Path, capsys: Any) -> None:
    found = outcomes(capsys, tmp_path, "--kind", "train")
    possible = [fault.name for fault in Fault.registry.values() if can_disturb(fault, run_kinds()["train"])]
    assert [each["fault"] for each in found] == possible
    results = {each["fault"]: each["result"] for each in found}
    assert results.pop("changed-data") == "refused"
    assert {results[name] for name in ("kill", "kill-write", "full-disk")} == {"equal"}
    assert set(results.values()) <= {"equal", "refused"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(run_kinds().keys() - {"train"}))
def test_every_other_kind_of_run_survives_every_fault(tmp_path: Path, capsys: Any, kind: str) -> None:
    # Damaged files are read alike on any number of ranks.
    only = () if kind == "fsdp" else ("kill-write", "kill-rank", "full-disk")
    flags = [word for fault in only for word in ("--fault", fault)]
    found = outcomes(capsys, tmp_path, "--kind", kind, *flags, "--seed", "100")
    same = {"equal"} if len(kind.split(" to ")) == 1 else {"equal", "near"}
    for each in found:
        may_refuse = each["fault"] in ("truncate", "flip", "changed-data")
        assert each["result"] in same | ({"refused"} if may_refuse else set()), each


def test_every_way_to_train_on_several_ranks_is_a_kind_of_run() -> None:
    kinds = run_kinds()
    assert {*Parallel.registry, "train", "fine-tune", "2 to 1", "1 to 2"} == kinds.keys()
    assert {kind.flags[1:] for kind in kinds.values() if kind.flags} == {(name,) for name in Parallel.registry}


def test_where_no_disk_can_be_mounted_files_have_a_limit(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def forbidden(*_: Any) -> None:
        raise PermissionError("mounting is not allowed here")

    monkeypatch.setattr(faults, "small_disk", forbidden)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    can_mount.cache_clear()
    try:
        flags = ["--fault", "full-disk", "--fault", "read-only", "--kind", "train", "--folder", str(tmp_path)]
        assert main([*flags, "--count", "2"]) == 0
    finally:
        can_mount.cache_clear()
    told = capsys.readouterr().out
    assert "full disk                      2=" in told
    assert "read-only folder                -" in told
    assert "the full disk is a limit on the size of files" in told
    assert "not tried: read-only folder, as this user may write everywhere" in told


# --- what is unsound is found


def broken(monkeypatch: Any, begin: Any) -> None:
    """Have the campaign start commands by `begin`."""
    monkeypatch.setattr(command, "Commands", lambda *_: forked_commands(begin))


@pytest.mark.slow
def test_a_run_that_continues_with_other_bits_is_a_failure_that_can_be_repeated(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    broken(monkeypatch, without_moments)
    arguments = ["--fault", "truncate", "--kind", "train", "--folder", str(tmp_path)]
    assert main([*arguments, "--count", "8"]) == 1
    told = capsys.readouterr()
    assert "FAILED" in told.out
    assert "it differs from the uninterrupted run: weights of latest, " in told.err
    again = shlex.split(told.err.partition("again: minitransformer campaign ")[2].partition("\n")[0])
    assert Path(told.err.partition("left: ")[2].partition("\n")[0]).is_dir()
    assert main([*again, "--folder", str(tmp_path)]) == 1


@pytest.mark.slow
def test_damage_that_is_not_noticed_is_a_failure(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    broken(monkeypatch, without_checksums)
    monkeypatch.setattr(faults.Flipped, "file_of", lambda self, case: newest_file(case.run, "*.safetensors"))
    found = outcomes(capsys, tmp_path, "--fault", "flip", "--kind", "train", "--count", "4", code=1)
    assert any(each["result"] == "failed" for each in found)


def newest_file(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


def test_a_traceback_is_a_failure(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    broken(monkeypatch, with_traceback)
    [found] = outcomes(capsys, tmp_path, "--fault", "changed-data", "--kind", "train", code=1)
    assert found["result"] == "failed"
    assert "RuntimeError: this should not happen" in found["reason"]


# --- starting commands, killing and stopping them


@pytest.fixture(scope="module")
def run() -> Commands:
    return forked_commands(one_of)


def test_ranks_are_told_what_torchrun_tells_them(run: Commands, tmp_path: Path) -> None:
    assert run(tmp_path, "say", "hello").output == f"0 alone hello {tmp_path.name}\n"
    assert run(tmp_path, "say", "hello", ranks=2).outputs == [f"{rank} 2 hello {tmp_path.name}\n" for rank in range(2)]


def test_a_command_is_killed_at_the_change_of_the_disk_that_is_asked_for(run: Commands, tmp_path: Path) -> None:
    assert run(tmp_path, "write", "5", ranks=2).calls == [5, 5]
    for path in tmp_path.iterdir():
        path.rmdir()
    ended = run(tmp_path, "write", "5", ranks=2, strike=Strike(rank=1, at=3))
    assert ended.codes == [0, KILLED]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0", "0-1", "0-2", "0-3", "0-4", "1-0", "1-1"]


def test_a_signal_comes_when_the_file_that_it_waits_for_is_there(run: Commands, tmp_path: Path) -> None:
    strike = Strike(after=0, once=tmp_path / "waiting-0")
    assert run(tmp_path, "wait", strike=strike).codes == [KILLED]


def test_a_stopped_rank_is_killed_when_the_others_have_ended(run: Commands, tmp_path: Path) -> None:
    strike = Strike(rank=1, after=0, signal=signal.SIGSTOP, once=tmp_path / "waiting-1")
    begun = time.monotonic()
    ended = run(tmp_path, "fail", "5", ranks=2, strike=strike, patience=1)
    assert ended.codes == [None, KILLED]  # rank 0 waits on, and has hung
    assert time.monotonic() - begun < 20


def test_when_a_rank_fails_the_others_are_ended_as_torchrun_does(run: Commands, tmp_path: Path) -> None:
    ended = run(tmp_path, "fail", "0", ranks=2)
    assert ended.codes == [2, -signal.SIGTERM]
    assert ended.in_one_sentence


# --- mistakes, and what is printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fault", "kil"], "did you mean 'kill'"),
        (["--kind", "trai"], "did you mean 'train'"),
        (["--count", "0"], "at least 1"),
        (["--count", "2", "--long"], "leave --count 2 out"),
        (["--json", "--markdown"], "leave --markdown out"),
        (["--folder", "my.txt"], "my.txt"),
    ],
)
def test_a_mistake_is_one_sentence(here: Path, capsys: Any, arguments: list[str], said: str) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_the_table_fits_into_80_columns(capsys: Any) -> None:
    kinds = list(run_kinds().values())
    table = FaultTable(kinds, markdown=False, quiet=False)
    found = [
        FaultOutcome(fault, kind.name, 0, result)
        for fault in Fault.registry
        for kind in kinds
        for result in ["equal"] * 9 + ["refused"] * 8
    ]
    for fault in Fault.registry.values():
        table.add(fault, found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all("9= 8r" in line for line in lines[1:])


def test_a_table_in_markdown_has_a_row_for_each_fault(capsys: Any) -> None:
    table = FaultTable([run_kinds()["train"]], markdown=True, quiet=False)
    table.add(Fault.named("kill"), [FaultOutcome("kill", "train", 0, "equal")])
    assert capsys.readouterr().out == "| fault | train |\n| --- | --- |\n| kill -9 at a random time | 1= |\n"
