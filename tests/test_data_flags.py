"""`--data` and its companions on the command line: several sources, tables, standard input, no validation at all."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from minitransformer.commands import compare, joined, sample, sweep
from minitransformer.commands.train import main
from minitransformer.errors import UserError
from minitransformer.runs import Run
from minitransformer.training.config import DataConfig, RunConfig
from tests.runs_for_tests import SMALL, TEXT, metrics
from tests.runs_for_tests import refused as refused_by_train

pytestmark = pytest.mark.unchecked_shapes


@pytest.fixture
def here(here: Path) -> Path:
    (here / "other.txt").write_text(TEXT.upper())
    return here


def train(*arguments: str, steps: int = 4) -> int:
    return main([*arguments, "--steps", str(steps), *SMALL])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refused_by_train(capsys, *arguments, "--steps", "4", *SMALL)


def pipe(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--data a b --lr 1", "--data a b --lr 1"),
        ("--data a --lr 1 --data b", "--data a b --lr 1"),
        ("--data=a --data=b --data c d", "--data a b c d"),
        ("--lr 1 --data - --validation-data x --data y --validation_data z", "--lr 1 --data - y --validation-data x z"),
        ("--steps 3 E0", "--steps 3 E0"),
    ],
)
def test_a_repeated_flag_has_all_its_values(given: str, expected: str) -> None:
    assert joined(given.split()) == expected.split()


@pytest.mark.parametrize("flags", [("--data", "my.txt", "other.txt"), ("--data", "my.txt", "--data", "other.txt")])
def test_several_files_are_learned_from_and_a_run_on_them_goes_on(here: Path, flags: tuple[str, ...]) -> None:
    assert train("gpt-nano", *flags) == 0
    path = here / "runs/gpt-nano-my-and-1-more"
    assert json.loads((path / "config.json").read_text())["data"]["data"] == ["my.txt", "other.txt"]
    assert Run.open(path).config.data.data == ("my.txt", "other.txt")
    assert main(["--resume", str(path), "--steps", "6"]) == 0
    assert metrics(path)[-1]["step"] == 6


def test_one_source_is_written_as_it_always_was(here: Path) -> None:
    assert DataConfig(data=("my.txt",)) == DataConfig(data="my.txt")
    record = RunConfig(data=DataConfig(data=("my.txt",), validation_data=("other.txt",))).to_json()
    assert (record["data"]["data"], record["data"]["validation_data"]) == ("my.txt", "other.txt")
    several = RunConfig(data=DataConfig(data=("a", "b")))
    assert RunConfig.from_json(json.loads(json.dumps(several.to_json())), "config.json") == several
    with pytest.raises(UserError, match="data is empty"):
        DataConfig(data=())


def test_standard_input_is_learned_from_and_a_run_on_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, TEXT)
    assert train("gpt-nano", "--data", "-", "--out", "piped") == 0
    stored = Run.open(Path("piped")).config.data.data
    assert isinstance(stored, str)
    assert Path(stored).read_text() == TEXT
    pipe(monkeypatch, "")
    assert main(["--resume", "piped", "--steps", "6"]) == 0
    pipe(monkeypatch, TEXT)
    assert main(["--resume", "piped", "--steps", "7", "--data", "-"]) == 0


def test_a_table_is_read_by_its_field_and_never_as_raw_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{i},a story of {i} owls and of {i * i} mice\n" for i in range(150))
    (here / "a.csv").write_text("id,story\n" + rows)
    assert "has no column 'text'" in refused(capsys, "--data", "a.csv")
    assert train("--data", "a.csv", "--field", "story") == 0
    assert "documents: 13" in capsys.readouterr().out
    assert not list((here / "runs").glob("*-2"))


def test_validation_data_of_plain_text_is_what_is_validated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("gpt-nano", "--data", "my.txt", "--validation-data", "other.txt") == 0
    assert f"validation {len(TEXT) + 1:,} tokens" in capsys.readouterr().out
    assert "is in --data and in --validation-data" in refused(capsys, "--data", "my.txt", "--validation-data", "my.txt")
    message = refused(capsys, "--data", "my.txt", "--validation-data", "other.txt", "--validation-target-data", "x")
    assert "validation_target_data belongs to data_kind 'pairs', and data_kind is 'text': leave it out" in message
    run = here / "runs/gpt-nano-my"
    assert main(["--resume", str(run), "--steps", "6", "--validation-data", "my.txt"]) == 2


def test_without_validation_a_run_trains_on_everything_and_its_last_checkpoint_is_the_best(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1):
        more = ["--validation-fraction", "0", "--save-every", "2", "--eval-every", "1", "--seed", str(number)]
        more += ["--log-every", "1"]
        assert train("gpt-nano", "--data", "my.txt", "--out", f"run-{number}", *more) == 0
    out = capsys.readouterr().out
    assert "validation none" in out
    assert "best at step" not in out
    path = here / "run-0"
    assert all("validation_loss" not in record for record in metrics(path))
    links = {name: (path / "checkpoints" / name).resolve().name for name in ("best", "latest")}
    assert links == {"best": "step-000004", "latest": "step-000004"}
    assert main(["--resume", "run-0", "--steps", "6"]) == 0
    assert (path / "checkpoints/best").resolve().name == "step-000006"
    assert sample.main(["run-0", "--prompt", "Line", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert compare.main(["run-0", "run-1"]) == 0
    assert "last training loss" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [("--patience", "3"), ("--sample-at-eval",)])
def test_what_waits_for_validations_is_refused_without_them(
    here: Path, capsys: pytest.CaptureFixture[str], flag: tuple[str, ...]
) -> None:
    assert "needs validation data, and validation_fraction is 0" in refused(
        capsys, "--data", "my.txt", "--validation-fraction", "0", *flag
    )


def test_a_sweep_without_validation_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gpt-nano", "--data", "my.txt", "--set", "lr=1e-3,3e-3", "--validation-fraction", "0", *SMALL]
    assert sweep.main(words) == 2
    assert "no validation data to choose a winner by" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["bert-mini", "t5-mini"])
def test_other_objectives_train_without_validation_too(here: Path, preset: str) -> None:
    assert train(preset, "--data", "my.txt", "--out", "run", "--validation-fraction", "0", "--log-every", "1") == 0
    assert "validation_loss" not in {name for record in metrics(here / "run") for name in record}
    assert (here / "run/samples.txt").read_text()


def test_pairs_train_without_validation_and_come_from_one_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = "".join(f"word {i}\twort {i}\n" for i in range(60))
    for name in ("a.tsv", "b.tsv"):
        (here / name).write_text(pairs)
    words = ["transformer-mini", "--validation-fraction", "0", "--batch-tokens", "64"]
    assert train(*words, "--data", "a.tsv", "--out", "run") == 0
    assert "train      60 pairs" in (out := capsys.readouterr().out)
    assert "validation none" in out
    assert "pairs must be in one file" in refused(capsys, *words, "--data", "a.tsv", "b.tsv")


def test_help_says_what_data_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in ("one or several of", ".csv, .tsv, .parquet or a .json array", "- for standard input"):
        assert expected in words
