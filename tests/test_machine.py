"""Device, arithmetic and compiler: what is chosen, by what is measured, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitransformer.errors import StorageError, UserError
from minitransformer.training import machine
from minitransformer.training.capabilities import cpu_bfloat16_units, fastest_precision
from minitransformer.training.machine import COMPILE_PAYS_AFTER_FLOPS, Resolved, choose_machine, keep_machine

LONG, SHORT = 2 * COMPILE_PAYS_AFTER_FLOPS["cpu"], 1e9
UNITS = {"AMX-BF16": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}


def give(monkeypatch: pytest.MonkeyPatch, units: str | None) -> None:
    """A CPU with these instructions for bfloat16 and no others, and a compiler."""
    for name, is_supported in UNITS.items():
        monkeypatch.setattr(torch.cpu, is_supported, lambda name=name: name == units)
    monkeypatch.setattr(machine, "find_compiler", lambda: "g++")


@pytest.mark.parametrize(
    ("units", "precision", "said"),
    [
        ("AMX-BF16", "bf16", "bf16 (this processor has AMX-BF16)"),
        ("AVX512-BF16", "bf16", "bf16 (this processor has AVX512-BF16)"),
        (None, "fp32", "fp32 (this processor has no bf16 units)"),
    ],
)
def test_a_cpu_gets_the_arithmetic_that_it_has_units_for(
    monkeypatch: pytest.MonkeyPatch, units: str | None, precision: str, said: str
) -> None:
    give(monkeypatch, units)
    chosen = choose_machine("cpu", "auto", "off", run_flops=LONG)
    assert chosen.precision == precision
    assert said in chosen.description


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")]
)
def test_a_gpu_gets_the_arithmetic_of_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_precision(torch.device("cuda"))[0] == precision


def test_other_devices_and_a_torch_without_the_kernels_get_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_precision(torch.device("mps"))[0] == "fp32"
    give(monkeypatch, "AMX-BF16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fastest_precision(torch.device("cpu"))[0] == "fp32"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_what_torch_says_of_this_cpu_is_what_the_kernel_says() -> None:
    flags = next(
        (line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), []
    )
    assert (cpu_bfloat16_units() is not None) == ("amx_bf16" in flags or "avx512_bf16" in flags)


def test_nothing_that_is_timed_chooses_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock(*_: object) -> float:
        raise AssertionError("a choice looked at the clock")

    monkeypatch.setattr(machine.time, "perf_counter", no_clock)
    machine.peak_flops.cache_clear()
    assert choose_machine("cpu", "auto", "auto", run_flops=LONG).precision in ("fp32", "bf16")


def test_measuring_the_processor_draws_no_number_of_the_run() -> None:
    before = torch.get_rng_state()
    assert machine.measured_flops(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("units", "run_flops", "fixed_shapes", "compiled", "said"),
    [
        ("AMX-BF16", LONG, True, True, "the run is long"),
        ("AMX-BF16", SHORT, True, False, "the run is short"),
        ("AMX-BF16", LONG, False, False, "batches have many shapes"),
        (None, LONG, True, False, "gains little in fp32"),
    ],
)
def test_compiling_is_left_out_where_it_would_not_pay(
    monkeypatch: pytest.MonkeyPatch, units: str | None, run_flops: float, fixed_shapes: bool, compiled: bool, said: str
) -> None:
    give(monkeypatch, units)
    chosen = choose_machine("cpu", "auto", "auto", run_flops=run_flops, fixed_shapes=fixed_shapes)
    assert chosen.compile is compiled
    assert said in chosen.description
    assert choose_machine("cpu", "auto", "on", run_flops=run_flops, fixed_shapes=fixed_shapes).compile


def test_threads_are_counted_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, said in ((1, "1 thread,"), (2, "2 threads,")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert said in choose_machine("cpu", "auto", "off", run_flops=LONG).description


@pytest.mark.parametrize(
    ("units", "kept", "asked", "anew", "changes"),
    [
        # What "auto" would be now does not count.
        ("AMX-BF16", ("cpu", "fp32", False), ("auto", "auto", "auto"), (), []),
        (None, ("cpu", "fp32", True), ("auto", "auto", "auto"), (), []),
        # What was asked for stays, units or not.
        (None, ("cpu", "bf16", False), ("auto", "bf16", "auto"), (), []),
        # What this machine does not have.
        (
            None,
            ("cpu", "bf16", False),
            ("auto", "auto", "auto"),
            (),
            ["precision bf16 -> fp32 (this machine has no bf16 units)"],
        ),
        (
            None,
            ("cuda", "fp16", False),
            ("auto", "auto", "auto"),
            (),
            ["device cuda -> cpu (there is no cuda here)", "precision fp16 -> fp32 (this machine has no fp16 units)"],
        ),
        # What is asked for now.
        ("AMX-BF16", ("cpu", "fp32", False), ("auto", "bf16", "on"), ("precision", "compile"), None),
        (
            "AMX-BF16",
            ("cpu", "fp32", False),
            ("cpu", "auto", "auto"),
            ("precision",),
            ["precision fp32 -> bf16 (this processor has AMX-BF16)"],
        ),
    ],
)
def test_a_run_that_goes_on_keeps_its_machine_and_says_what_must_differ(
    monkeypatch: pytest.MonkeyPatch,
    units: str | None,
    kept: tuple[str, str, bool],
    asked: tuple[str, str, str],
    anew: tuple[str, ...],
    changes: list[str] | None,
) -> None:
    give(monkeypatch, units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    chosen, said = keep_machine(Resolved(*kept), *asked, run_flops=LONG, anew=anew)
    if changes is None:
        changes = ["precision fp32 -> bf16 (as asked)", "compile off -> on (as asked)"]
    assert said == changes
    if not changes:
        assert chosen.resolved == Resolved(*kept)


def test_a_compiled_run_goes_on_without_a_compiler_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_compiler", lambda: None)
    chosen, said = keep_machine(Resolved("cpu", "fp32", True), "auto", "fp32", "auto", run_flops=LONG)
    assert not chosen.compile
    assert said == ["compile on -> off (there is no C++ compiler, g++ or clang++)"]


def test_a_device_that_was_asked_for_and_is_gone_is_no_guess_of_ours() -> None:
    with pytest.raises(UserError, match=r"device 'cuda:99' cannot be used here"):
        keep_machine(Resolved("cuda", "bf16", True), "cuda:99", "auto", "auto", run_flops=LONG)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        *((record, "a damaged record of its machine") for record in ([], "cpu", {}, {"device": "cpu"})),
        ({"device": "cpu", "precision": "bf16", "compile": "no"}, "compile 'no', which must be true or false"),
    ],
)
def test_a_damaged_record_of_a_machine_gets_one_sentence(record: object, message: str) -> None:
    with pytest.raises(StorageError, match=rf"config\.json has {message}"):
        Resolved.from_json(record, "config.json")


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
