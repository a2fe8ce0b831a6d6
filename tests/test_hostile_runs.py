"""Damaged and hostile run folders are refused in one sentence: no code runs, and nothing is opened elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer import settings
from minitransformer.records import checked_fields
from minitransformer.runs import Run
from minitransformer.training.checkpoint import checkpoints_in, load_trainer_state, remove_old_checkpoints
from minitransformer.training.config import DataConfig, RunConfig, TrainingConfig
from minitransformer.training.logging import RunFiles
from tests.hostile_for_tests import changed, compare_runs, refused, run_folder


@pytest.mark.parametrize(
    ("part", "name", "value", "must"),
    [
        ("model", "num_layers", True, "a whole number"),
        ("model", "num_layers", 2.0, "a whole number"),
        ("model", "num_layers", 10**30, "a whole number"),
        ("model", "num_kv_heads", "2", "a whole number or null"),
        ("model", "residual", ["pre"], "an object"),
        ("model", "residual", {"name": ["pre"]}, "a text"),
        ("model", "window_pattern", [1], "a list"),
        ("model", "window_pattern", True, "a list"),
        ("training", "compile", "maybe", "'auto' or 'on' or 'off'"),
        ("training", "lr", "0.1", "a number"),
        ("training", "lr", 10**400, "a number"),
        ("training", "lr", False, "a number"),
        ("training", "patience", {}, "a whole number or null"),
        ("training", "tensorboard", 0, "true or false"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(
    tmp_path: Path, part: str, name: str, value: Any, must: str
) -> None:
    path = run_folder(tmp_path / "run")
    record = json.loads((path / "config.json").read_text())
    changed(path / "config.json", **{part: {**record[part], name: value}})
    assert f"config.json has {name} " in (said := refused(lambda: Run.open(path)))
    assert f"which must be {must}: " in said


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    changed(path / "config.json", training={**RunConfig().to_json()["training"], "lr": 1})
    assert type(Run.open(path).config.training.lr) is float


@pytest.mark.parametrize("record", [{}, {"model_type": "gpt2"}, {"model": {}, "data": {}}, {"model": 3}])
def test_another_json_object_is_no_run(tmp_path: Path, record: Any) -> None:
    path = run_folder(tmp_path / "run")
    (path / "config.json").write_text(json.dumps(record))
    said = "is a public checkpoint" if "model_type" in record else "is not the configuration of a run (it has no"
    assert said in refused(lambda: Run.open(path))


@pytest.mark.parametrize("line", ["5", "[]", "null", '"step"', '{"step": "7"}', "{", '{"step": true}', "[" * 100_000])
def test_a_line_that_is_no_record_is_left_out_when_a_run_goes_on(tmp_path: Path, line: str) -> None:
    path = run_folder(tmp_path / "run")
    metrics = path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(line + "\n" + whole)
    compare_runs(path)
    RunFiles(path, resume_at=9).close()
    assert metrics.read_text() == whole


@pytest.mark.parametrize("manifest", ["[]", "5", '{"sha256": []}', '{"sha256": {"model.safetensors": 5}}', "[" * 9999])
def test_a_manifest_of_another_kind_is_damage(tmp_path: Path, manifest: str) -> None:
    path = run_folder(tmp_path / "run")
    (path / "checkpoints/step-000005/manifest.json").write_text(manifest)
    assert "checkpoint step-000005" in (said := refused(lambda: Run.open(path).load_model()))
    assert "is damaged" in said


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname"])
def test_a_manifest_names_files_of_its_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = run_folder(tmp_path / "run")
    (tmp_path / "secret").write_text("secret")
    changed(path / "checkpoints/step-000005/manifest.json", sha256={name: "0" * 64})
    opened: list[Path] = []
    monkeypatch.setattr("minitransformer.files.sha256", lambda file: opened.append(file))
    refused(lambda: Run.open(path).load_model())
    assert not opened


def test_links_to_checkpoints_elsewhere_are_none(tmp_path: Path) -> None:
    path, other = run_folder(tmp_path / "run"), run_folder(tmp_path / "other")
    folder, elsewhere = path / "checkpoints", other / "checkpoints/step-000005"
    (folder / "step-000009").symlink_to(elsewhere)
    (folder / "step-000010").write_text("a file")
    for link in ("latest", "best"):
        (folder / link).unlink(missing_ok=True)
    (folder / "latest").symlink_to(elsewhere)
    assert [found.name for found in checkpoints_in(folder)] == ["step-000005"]
    assert Run.open(path).checkpoint() == (folder / "step-000005").resolve()
    for name in ("latest", "step-000009", str(elsewhere)):
        assert "has no checkpoint" in refused(lambda name=name: Run.open(path).load_model(name))
    (folder / "best").symlink_to(elsewhere)
    assert "has no checkpoint 'best'" in refused(lambda: Run.open(path).load_model())
    remove_old_checkpoints(folder, 1)
    assert elsewhere.is_dir()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 10**9, "num_layers is 1000000000: it must be at most"),
        ("num_layers", 9999, "tensors, too few for 9999 layers"),
        ("num_experts", 9999, "tensors, too few for"),
        ("d_ff", 10**8, "too few for"),
        ("vocab_size", 10**8, "too few for"),
        ("d_model", 10**8, "too few for"),
        ("context_length", 10**9, "it must be at most"),
        ("num_heads", 10**12, "it must be at most"),
    ],
)
def test_a_model_that_is_larger_than_its_weights_is_refused_before_it_takes_memory(
    tmp_path: Path, name: str, value: int, message: str
) -> None:
    path = run_folder(tmp_path / "run")
    record = json.loads((path / "config.json").read_text())
    changed(path / "config.json", model={**record["model"], name: value})
    assert message in refused(lambda: Run.open(path).load_model())


class Runs:
    """What makes its mark where a pickle is opened by who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("content", ["code", "a list", "another state", "empty", "cut"])
def test_the_state_of_a_trainer_runs_no_code_and_is_refused_when_damaged(tmp_path: Path, content: str) -> None:
    checkpoint = run_folder(tmp_path / "run") / "checkpoints/step-000005"
    state = checkpoint / "trainer.pt"
    if content == "code":
        torch.save(Runs(tmp_path / "mark"), state)
    elif content in ("a list", "another state"):
        torch.save([1] if content == "a list" else {"a": 1}, state)
    else:
        state.write_bytes(state.read_bytes()[: 100 if content == "cut" else 0])
    assert "trainer.pt" in refused(lambda: load_trainer_state(checkpoint))
    assert not (tmp_path / "mark").exists()


def test_values_are_checked_by_the_types_of_a_record() -> None:
    whole = {**RunConfig().to_json()["training"], "probe": ["a"], "patience": 3}
    assert settings.from_json(TrainingConfig, whole, "x").probe == ("a",)
    for values in ({"probe": "a"}, {"probe": [3]}, {"compile": "maybe"}, {"device": None}):
        assert refused(lambda values=values: settings.from_json(TrainingConfig, values, "x")).startswith("x has ")
    assert checked_fields(DataConfig, {"field": "a"}, "x") == {"field": "a"}
