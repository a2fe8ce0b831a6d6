"""Which device, arithmetic and compiler a run uses, with the reason in words."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitransformer.errors import UserError
from minitransformer.training.precision import Precision

# Compiling costs about half a minute on a CPU, so a run must be this many times longer before it pays.
COMPILE_PAYS_AFTER_FLOPS = {"cpu": 6e13, "cuda": 1e16}


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
    compiled, why_compiled = _choose_compile(chosen, compile, run_flops)
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
        Precision.named(name)
        return name, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies it fastest"
        return "fp16", "this GPU has no bf16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bf16", "this processor multiplies it fastest"
    return "fp32", "this processor has no bf16" if device.type == "cpu" else "bf16 gains nothing here"


def _choose_compile(device: torch.device, choice: str, run_flops: float) -> tuple[bool, str]:
    if choice == "off":
        return False, "as asked"
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")):
        return False, "it needs a C++ compiler, g++ or clang++, and there is none"
    if device.type not in COMPILE_PAYS_AFTER_FLOPS:
        return (True, "as asked") if choice == "on" else (False, f"not on {device.type}")
    if choice == "on":
        return True, "as asked"
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


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
