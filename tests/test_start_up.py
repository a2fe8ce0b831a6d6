"""What a command loads before it answers, and how models are counted without making them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from minitransformer.models.config import ModelConfig
from minitransformer.models.model import build_model, count_parameters

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


@pytest.mark.parametrize("topology", ["decoder", "encoder", "encoder-decoder", "rnn"])
def test_models_that_are_only_counted_have_as_many_weights_and_draw_nothing(topology: str) -> None:
    config = ModelConfig(topology=topology, d_model=16, num_heads=2, num_layers=2, vocab_size=50)
    before = torch.get_rng_state()
    counted = count_parameters(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert counted == build_model(config).num_parameters()
