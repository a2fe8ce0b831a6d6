"""What a command loads before it answers, and how models are counted without making them."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from minitransformer.__main__ import COMMANDS
from minitransformer.commands import load_command, start
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model, count_parameters
from minitransformer.training.optimizers import Optimizer

LOADED = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit:
    print("LOADED", *sys.modules)
"""


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_loads_no_compiler(command: str) -> None:
    out = subprocess.run([sys.executable, "-c", LOADED, command], capture_output=True, text=True, check=True).stdout
    loaded = set(out.partition("LOADED")[2].split())
    assert "torch" in loaded
    assert not {"torch._dynamo", "sympy", "transformers"} & loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_80_columns_and_has_no_two_blank_lines(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        load_command(command).main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "usage: " in out
    assert max(map(len, out.splitlines())) <= 80
    assert "\n\n\n" not in out


def test_the_list_of_commands_fits_into_80_columns() -> None:
    assert max(17 + len(what) for what in COMMANDS.values()) <= 80


TRAINED = """
import sys, torch
from minitransformer.commands import start
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model
from minitransformer.training.config import TrainingConfig
from minitransformer.training.optimizers import Optimizer, build_optimizers
model = build_model(ModelConfig(d_model=8, num_heads=1, num_layers=1, vocab_size=5))
optimizers = build_optimizers(Optimizer.choose(sys.argv[1]), model, TrainingConfig().rates)
model(torch.arange(5)[None]).sum().backward()
for optimizer in optimizers:
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print(*sys.modules)
"""


@pytest.mark.parametrize("optimizer", Optimizer.registry)
def test_the_first_step_loads_no_compiler(optimizer: str) -> None:
    program = [sys.executable, "-c", TRAINED, optimizer]
    loaded = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    assert "torch.optim" in loaded
    assert "torch._dynamo" not in loaded


@pytest.mark.parametrize("topology", ["decoder", "encoder", "encoder-decoder", "rnn"])
def test_models_that_are_only_counted_have_as_many_weights_and_draw_nothing(topology: str) -> None:
    config = ModelConfig(topology=topology, d_model=16, num_heads=2, num_layers=2, vocab_size=50)
    before = torch.get_rng_state()
    counted = count_parameters(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert counted == build_model(config).num_parameters()


def test_a_command_that_starts_leaves_garbage_collection_as_it_was() -> None:
    assert start("bench", ["--device", "cpu", "--only", "nothing"]) == 2
    assert gc.isenabled()
    gc.unfreeze()


def test_a_command_of_one_process_runs_once_or_not_at_all_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minitransformer.commands.import_module", lambda name: pytest.fail(f"{name} has started"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in COMMANDS.keys() - {"train", "doctor", "verify-resume"}:
        assert start(command, []) == 2
        assert f"`{command}` is one process" in capsys.readouterr().err
