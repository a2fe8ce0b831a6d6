"""Which device, arithmetic and compiler a run uses, with the reason in words."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from minitransformer.errors import UserError
from minitransformer.toolchain import cache_folder, find_compiler
from minitransformer.training.precision import Precision

# Compiling costs about half a minute on a CPU, so a run must be this many times longer before it pays.
COMPILE_PAYS_AFTER_FLOPS = {"cpu": 6e13, "cuda": 1e16}
# Matrix products are most of a step, and not all of it. Processors are far from this on either side: those with matrix
# units for bf16 double the rate, others fall to a hundredth, so that noise never makes a resumed run choose otherwise.
BF16_PAYS_FROM = 1.3
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Machine:
    """What was chosen, and one line that says why."""

    device: torch.device
    precision: str
    compile: bool
    description: str


def choose_machine(
    device: str, precision: str, compile: str, *, run_flops: float, fixed_shapes: bool = True
) -> Machine:
    """Resolve every "auto" for this machine and a run of `run_flops` floating-point operations.

    Where batches have many shapes, compiling takes longer and gains less: then it is left to who asks for it.
    """
    chosen = choose_device(device)
    name, why = _choose_precision(chosen, precision)
    compiled, why_compiled = _choose_compile(chosen, name, compile, run_flops)
    if compile == "auto" and compiled and not fixed_shapes:
        compiled, why_compiled = False, "batches have many shapes"
    threads = f", {torch.get_num_threads()} threads" if chosen.type == "cpu" else ""
    description = f"{chosen}{threads}, {name} ({why}), compile {'on' if compiled else 'off'} ({why_compiled})"
    return Machine(chosen, name, compiled, description)


def choose_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" the fastest kind there is; a `UserError` if there is none such."""
    if name == "auto":
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, there in kinds.items() if there))
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here ({reason}): choose cpu, or leave --device out") from None
    return device


def _choose_precision(device: torch.device, name: str) -> tuple[str, str]:
    if name != "auto":
        if why_not := Precision.named(name).why_not(device):
            raise UserError(f"precision {name!r} is impossible on {device} ({why_not}): choose bf16, or leave it out")
        return name, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies it fastest"
        return "fp16", "this GPU has no bf16"
    if device.type == "cpu":
        gain = peak_flops(device, torch.bfloat16) / peak_flops(device, torch.float32)
        return ("bf16", f"{gain:.1f}x fp32 here") if gain > BF16_PAYS_FROM else ("fp32", f"bf16 is {gain:.2g}x here")
    return "fp32", "bf16 gains nothing here"


def _choose_compile(device: torch.device, precision: str, choice: str, run_flops: float) -> tuple[bool, str]:
    if choice == "off":
        return False, "as asked"
    if device.type == "cpu" and find_compiler() is None:
        return False, "it needs a C++ compiler, g++ or clang++, and there is none"
    if device.type not in COMPILE_PAYS_AFTER_FLOPS:
        return (True, "as asked") if choice == "on" else (False, f"not on {device.type}")
    if choice == "on":
        return True, "as asked"
    if device.type == "cpu" and precision == "fp32":
        return False, "on a CPU it gains little in fp32"  # measured: 1.0 to 1.17 times as fast, after a minute
    pays = run_flops > COMPILE_PAYS_AFTER_FLOPS[device.type]
    return pays, "the run is long" if pays else "the run is short"


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that `device` reaches in a matrix product which takes it some milliseconds."""
    size, best = 128, 0.0
    while best < 0.005 and size < 8192:
        size *= 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = min(_seconds(lambda: (a @ b)[0, 0].item()) for _ in range(4))  # noqa: B023
    return 2 * size**3 / best


peak_flops = cache(measured_flops)
"""the same, measured once: what is chosen by it, and compared with it, is one number"""


def compiled(model: nn.Module) -> nn.Module:
    """`model` by torch.compile, which keeps what it makes in the user's cache: later runs begin within seconds."""
    folder = cache_folder() / "inductor"
    with suppress(OSError):  # torch has a folder of its own, which does not outlive the machine's next start
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # A GPU's products are timed in many ways; a CUDA graph would write its next output over this one.
    on_gpu = next(model.parameters(), torch.empty(0)).is_cuda
    return torch.compile(model, mode="max-autotune-no-cudagraphs" if on_gpu else None)  # type: ignore[return-value]


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one: by default, large tensors are fetched anew, page by page."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
