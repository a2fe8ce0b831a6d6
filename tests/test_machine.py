"""Device, arithmetic and compiler: what is chosen, by what is measured, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitransformer.training import machine
from minitransformer.training.machine import COMPILE_PAYS_AFTER_FLOPS, choose_machine

LONG, SHORT = 2 * COMPILE_PAYS_AFTER_FLOPS["cpu"], 1e9


@pytest.fixture
def bf16_gain(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> float:
    """How many times as fast as float32 this machine seems to multiply bfloat16."""
    rates = {torch.float32: 1e11, torch.bfloat16: request.param * 1e11}
    monkeypatch.setattr(machine, "peak_flops", lambda device, dtype: rates[dtype])
    monkeypatch.setattr(machine, "find_compiler", lambda: "g++")
    return request.param


@pytest.mark.parametrize(
    ("bf16_gain", "precision", "said"),
    [
        (2.0, "bf16", "bf16 (2.0x fp32 here)"),
        (1.0, "fp32", "(bf16 is 1x here)"),
        (0.01, "fp32", "(bf16 is 0.01x here)"),
    ],
    indirect=["bf16_gain"],
)
def test_a_processor_gets_the_arithmetic_that_it_is_measured_to_be_fastest_in(
    bf16_gain: float, precision: str, said: str
) -> None:
    chosen = choose_machine("cpu", "auto", "off", run_flops=LONG)
    assert chosen.precision == precision
    assert said in chosen.description


@pytest.mark.parametrize(
    ("bf16_gain", "run_flops", "fixed_shapes", "compiled", "said"),
    [
        (2.0, LONG, True, True, "the run is long"),
        (2.0, SHORT, True, False, "the run is short"),
        (2.0, LONG, False, False, "batches have many shapes"),
        (0.5, LONG, True, False, "gains little in fp32"),
    ],
    indirect=["bf16_gain"],
)
def test_compiling_is_left_out_where_it_would_not_pay(
    bf16_gain: float, run_flops: float, fixed_shapes: bool, compiled: bool, said: str
) -> None:
    chosen = choose_machine("cpu", "auto", "auto", run_flops=run_flops, fixed_shapes=fixed_shapes)
    assert chosen.compile is compiled
    assert said in chosen.description
    assert choose_machine("cpu", "auto", "on", run_flops=run_flops, fixed_shapes=fixed_shapes).compile


REUSED = """
import resource, torch
from minitransformer.training.machine import keep_freed_memory
keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told to keep memory")
def test_memory_that_was_freed_is_used_again_without_fetching_its_pages() -> None:
    done = subprocess.run([sys.executable, "-c", REUSED], capture_output=True, check=True)
    assert int(done.stdout) < 10


def test_what_the_compiler_makes_is_kept_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what stood there comes back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.compiled(torch.nn.Identity())
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "minitransformer" / "inductor"
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    machine.compiled(torch.nn.Identity())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
