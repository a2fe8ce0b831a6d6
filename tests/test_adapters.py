"""Runs that train an adapter: the base stays as it is, the adapter alone is saved, and merged or switched by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minitransformer.commands import doctor, evaluate, merge, sample, sweep
from minitransformer.commands.train import main
from minitransformer.models.adapters.lora import is_head
from minitransformer.models.int8 import dequantise_rows, quantise_rows
from minitransformer.models.model import build_model
from minitransformer.models.surgery import is_linear_map
from minitransformer.runs import Run
from minitransformer.training.weights import load_model_weights, stored_tensors, unique_tensors
from tests.runs_for_tests import SMALL, TEXT, assert_same_weights, metrics, refused, saved_weights

FORMATS = ("fp32", "int8")


FLAGS = ["--data", "my.txt", "--device", "cpu", "--compile", "off", "--precision", "fp32", "--save-every", "2"]
LORA = ["--adapter", "lora", "--lora-rank", "2", "--lora-dropout", "0.2", *FLAGS]
IN_8_BITS = ["--lora-base-weights", "int8"]


@pytest.fixture
def base(here: Path, capsys: Any) -> Path:
    assert main(["gpt-nano", "--out", "base", "--data", "my.txt", "--steps", "4", *SMALL]) == 0
    (here / "my.txt").write_text(TEXT[2000:] * 2)
    capsys.readouterr()
    return here / "base"


def tuned(*arguments: str, parent: str = "base", out: str = "tuned", steps: int = 4) -> int:
    return main(["--init-from", parent, "--out", out, "--steps", str(steps), *LORA, *arguments])


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("flags", [[], IN_8_BITS], ids=FORMATS)
def test_a_checkpoint_holds_the_adapter_alone_and_opens_as_a_plain_model(
    base: Path, here: Path, capsys: Any, flags: list[str]
) -> None:
    assert tuned(*flags) == 0
    assert "of which" in capsys.readouterr().out
    stored = saved_weights(here / "tuned")
    assert stored
    assert all(".lora." in name for name in stored)
    model = Run.open(here / "tuned").load_model("latest")
    plain = Run.open(base)
    assert model.config == plain.config.model
    before, after = plain.load_model().state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.replace(".lora.b", ".weight") for name in stored if name.endswith(".lora.b")}
    for name in changed:
        a, b = (stored[name.replace(".weight", f".lora.{which}")] for which in "ab")
        below = dequantise_rows(*quantise_rows(before[name])) if flags else before[name]
        torch.testing.assert_close(after[name], below + 16 / 2 * b @ a)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("flags", [[], IN_8_BITS], ids=FORMATS)
def test_a_resumed_adapter_ends_with_the_bits_of_an_uninterrupted_one(base: Path, here: Path, flags: list[str]) -> None:
    assert tuned("--schedule", "constant", *flags, out="a", steps=4) == 0
    assert tuned("--schedule", "constant", *flags, out="b", steps=2) == 0
    assert main(["--resume", "b", "--steps", "4"]) == 0
    assert_same_weights(saved_weights(here / "a"), saved_weights(here / "b"))
    assert metrics(here / "a")[-1] == metrics(here / "b")[-1]


@pytest.mark.unchecked_shapes
def test_adapters_are_stacked(base: Path, here: Path) -> None:
    assert tuned(out="first") == 0
    assert tuned(parent="first", out="second") == 0
    below, above = Run.open(here / "first").load_model(), build_model(Run.open(here / "second").config.model)
    load_model_weights(here / "second/checkpoints/latest", above)
    theirs = below.state_dict()
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in unique_tensors(above).items() if "lora" not in name
    )
    assert stored_tensors(above).keys() == saved_weights(here / "second").keys()
    assert Run.open(here / "second").load_model().config == below.config


@pytest.mark.unchecked_shapes
def test_a_run_of_all_weights_starts_from_the_merged_model(base: Path, here: Path) -> None:
    assert tuned(out="first") == 0
    assert main(["--init-from", "first", "--out", "all", "--steps", "1", *FLAGS]) == 0
    start = saved_weights(here / "all", "step-000000")
    assert_same_weights(start, unique_tensors(Run.open(here / "first").load_model()))


@pytest.mark.unchecked_shapes
def test_folders_that_are_moved_together_still_fit(base: Path, here: Path) -> None:
    assert tuned() == 0
    before = Run.open(here / "tuned").load_model().state_dict()
    (here / "elsewhere").mkdir()
    for name in ("base", "tuned"):
        shutil.move(here / name, here / "elsewhere" / name)
    assert_same_weights(before, Run.open(here / "elsewhere/tuned").load_model().state_dict())


@pytest.mark.unchecked_shapes
def test_another_base_and_none_get_one_sentence(base: Path, here: Path, capsys: Any) -> None:
    assert tuned() == 0
    for command, flags in ((sample.main, ["tuned", "--prompt", "L"]), (main, ["--resume", "tuned", "--steps", "9"])):
        shutil.move(base, here / "away")
        assert "base of the adapter" in refused(capsys, *flags, main=command)
        assert main(["gpt-nano", "--out", "base", "--data", "my.txt", "--steps", "4", "--seed", "1", *SMALL]) == 0
        error = refused(capsys, *flags, main=command)
        assert "another base" in error
        assert "SHA-256" in error
        shutil.rmtree(base)
        shutil.move(here / "away", base)


@pytest.mark.unchecked_shapes
def test_an_adapter_without_a_base_is_refused(here: Path, capsys: Any) -> None:
    assert "--init-from" in refused(capsys, "gpt-nano", "--adapter", "lora", *FLAGS)
    assert "adapter" in refused(capsys, "rnn-attention", "--adapter", "lora", *FLAGS)
    assert not (here / "runs").exists()


@pytest.mark.unchecked_shapes
def test_an_adapter_learns_by_adamw_at_its_own_rate(base: Path, here: Path) -> None:
    assert tuned(steps=1) == 0
    training = Run.open(here / "tuned").config.training
    assert (training.optimizer.name, training.lr, training.weight_decay) == ("adamw", 1e-3, 0.0)
    record = json.loads((here / "tuned/config.json").read_text())
    assert record["model"]["adapter"] == {
        "name": "lora",
        "pattern": ".*",
        "rank": 2,
        "alpha": 16.0,
        "dropout": 0.2,
        "also_train": None,
        "base_weights": "fp32",
    }


@pytest.mark.unchecked_shapes
def test_a_merged_run_stands_alone_and_writes_the_same_text(base: Path, here: Path, capsys: Any) -> None:
    assert tuned() == 0
    prompt = ["--prompt", "Line 7", "--temperature", "0", "--max-new-tokens", "30"]
    model = Run.open(here / "tuned").load_model()
    capsys.readouterr()
    assert sample.main(["tuned", *prompt]) == 0
    written = capsys.readouterr().out
    assert merge.main(["tuned", "--out", "whole"]) == 0
    shutil.rmtree(base)
    shutil.rmtree(here / "tuned")
    assert_same_weights(model.state_dict(), Run.open(here / "whole").load_model().state_dict())
    capsys.readouterr()
    assert sample.main(["whole", *prompt]) == 0
    assert capsys.readouterr().out == written
    assert main(["--init-from", "whole", "--out", "more", "--steps", "1", *FLAGS]) == 0
    assert "no adapter" in refused(capsys, "whole", "--out", "again", main=merge.main)


@pytest.mark.unchecked_shapes
def test_checkpoints_are_merged_into_their_mean(base: Path, here: Path, capsys: Any) -> None:
    assert main(["--init-from", "base", "--out", "tuned", "--steps", "4", "--keep-last", "3", *FLAGS]) == 0
    assert merge.main(["tuned", "--average", "2", "--out", "mean"]) == 0
    parts = [saved_weights(here / "tuned", f"step-00000{step}") for step in (2, 4)]
    assert_same_weights(
        {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}, saved_weights(here / "mean")
    )
    assert not torch.equal(parts[0]["embedding.table.weight"], parts[1]["embedding.table.weight"])
    capsys.readouterr()
    assert evaluate.main(["mean"]) == 0, "on the validation data of its run"
    assert "was not made by train.py, and has no training" in refused(capsys, "--resume", "mean", "--steps", "9")
    for flags, words in (
        (["--average", "9"], "has 3 checkpoints, not 9: lower --average"),
        (["--average", "1"], "average is 1: give at least 2"),
        (["--average", "2", "--checkpoint", "latest"], "leave out --checkpoint"),
    ):
        assert words in refused(capsys, "tuned", "--out", "other", *flags, main=merge.main)


@pytest.mark.unchecked_shapes
def test_the_doctor_counts_the_gradients_of_an_adapter_and_asks_for_its_base(
    base: Path, here: Path, capsys: Any
) -> None:
    assert doctor.main(["--init-from", "base", *LORA, *IN_8_BITS, "--json"]) == 0
    found = {each["topic"]: each for each in json.loads(capsys.readouterr().out)["findings"]}["parameters"]["figures"]
    assert found["gradient_bytes"] == 4 * 576
    assert found["optimizer_bytes"] < found["gradient_bytes"] * 3
    model = Run.open(base).load_model()
    maps = [part.weight.shape for part in model.modules() if is_linear_map(part) and not is_head(part)]
    in_full = sum(tensor.nbytes for tensor in unique_tensors(model).values())
    assert found["bytes"] == in_full + 4 * 576 - sum(3 * shape.numel() - 4 * shape[0] for shape in maps)
    grid = ["gpt-nano", *SMALL, "--data", "my.txt", "--set", "adapter=none,lora", "--out", "s"]
    assert "--init-from" in refused(capsys, *grid, main=sweep.main)
    assert doctor.main(["gpt-nano", *LORA, *SMALL]) == 1
    assert "--init-from" in capsys.readouterr().out


@pytest.mark.unchecked_shapes
def test_adapters_of_one_base_are_switched_by_name(base: Path, here: Path, capsys: Any) -> None:
    """The base may have been moved, and keeps its own text without an adapter."""
    prompt = ["--prompt", "Line 7", "--seed", "3", "--max-new-tokens", "20"]
    texts = {}
    for name, seed in (("one", "1"), ("two", "2")):
        assert tuned("--seed", seed, "--lr", "0.1", out=name) == 0
        capsys.readouterr()
        assert sample.main([name, *prompt]) == 0
        texts[name] = capsys.readouterr().out
    assert texts["one"] != texts["two"]
    (here / "models").mkdir()
    shutil.move(base, here / "models/moved")
    for name, text in texts.items():
        assert sample.main(["models/moved", "--adapter", name, *prompt]) == 0
        assert capsys.readouterr().out == text
    assert main(["gpt-nano", "--out", "other", "--data", "my.txt", "--steps", "4", "--seed", "1", *SMALL]) == 0
    assert main(["gpt-nano", "--out", "third", "--data", "my.txt", "--steps", "3", *SMALL]) == 0
    for run, word in (("other", "SHA-256"), ("third", "no checkpoint step-000004")):
        error = refused(capsys, run, "--adapter", "one", *prompt, main=sample.main)
        assert "another base" in error
        assert word in error
    assert "no adapter" in refused(capsys, "other", "--adapter", "third", *prompt, main=sample.main)


# --- frozen weights


@pytest.mark.unchecked_shapes
def test_frozen_weights_stay_bit_for_bit_and_resume(base: Path, here: Path) -> None:
    frozen = ["--freeze", "embedding.*", "--freeze", r".*attention\..*", "--schedule", "constant"]
    for out, steps in (("whole", "4"), ("parts", "2")):
        assert main(["--init-from", "base", "--out", out, "--steps", steps, *frozen, *FLAGS]) == 0
    assert main(["--resume", "parts", "--steps", "4"]) == 0
    before, after = saved_weights(base), saved_weights(here / "whole")
    assert_same_weights(after, saved_weights(here / "parts"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("embedding.") or "attention." in name}
    assert Run.open(here / "whole").config.training.freeze == ("embedding.*", r".*attention\..*")
    assert main(["--init-from", "whole", "--out", "child", "--steps", "1", *FLAGS]) == 0
    assert Run.open(here / "child").config.training.freeze == ()


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--freeze", "embeding"], ["freeze 'embeding'", "no weight", "embedding.table.weight"]),
        (["--freeze", ".*"], ["no weight to train"]),
        (["--freeze", "["], ["no regular expression"]),
        (["--freeze", "head.*", "--adapter", "lora"], ["adapter 'lora'", "leave freeze out"]),
    ],
)
def test_what_cannot_be_frozen_gets_one_sentence(base: Path, capsys: Any, flags: list[str], words: list[str]) -> None:
    error = refused(capsys, "--init-from", "base", "--out", "x", "--steps", "1", *FLAGS, *flags)
    assert all(word in error for word in words), error
    assert not Path("x").exists()
