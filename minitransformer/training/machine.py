"""The device, precision and compilation of a run, with the reasons in words."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from minitransformer.errors import UserError
from minitransformer.records import whole_record
from minitransformer.toolchain import cache_folder, find_compiler
from minitransformer.training.capabilities import fastest_precision, why_not_fast
from minitransformer.training.precision import Precision

# Compiling takes about half a minute on a CPU; it pays for runs longer than this.
COMPILE_PAYS_AFTER_FLOPS = {"cpu": 6e13, "cuda": 1e16}
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Resolved:
    """The resolved values of "auto", stored in `config.json` and kept on resume."""

    device: str
    """device type, such as cuda"""
    precision: str
    compile: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any, origin: str) -> Resolved | None:
        """The values in `record`, from the file `origin`; None in old files. Raises `StorageError` if damaged."""
        if record is None:
            return None
        resolved = whole_record(cls, record, "its machine", origin)
        Precision.named(resolved.precision)
        return resolved


@dataclass(frozen=True)
class Machine:
    """The resolved device, precision and compilation, a line that explains them, and the reasons in it."""

    device: torch.device
    precision: str
    compile: bool
    description: str
    why_precision: str = ""
    why_compile: str = ""

    @property
    def resolved(self) -> Resolved:
        return Resolved(self.device.type, self.precision, self.compile)


def choose_machine(
    device: str, precision: str, compile: str, *, run_flops: float, fixed_shapes: bool = True
) -> Machine:
    """Resolve every "auto" on this machine, for a run of `run_flops` floating-point operations.

    Batches of many shapes compile slowly for little gain: then "auto" does not compile.
    """
    chosen = choose_device(device)
    name, why = choose_precision(chosen, precision)
    return _described(chosen, (name, why), _choose_compile(chosen, name, compile, run_flops, fixed_shapes))


def keep_machine(
    kept: Resolved,
    device: str,
    precision: str,
    compile: str,
    *,
    run_flops: float,
    fixed_shapes: bool = True,
    anew: Collection[str] = (),
) -> tuple[Machine, list[str]]:
    """The machine of a resumed run, as `kept`, and the differences on this machine, in words.

    `device`, `precision` and `compile` are the settings of the run; `anew` names those that were changed.
    Raises `UserError` for impossible settings.
    """
    chosen = _kept_device(kept, device, anew)
    name, why = choose_precision(chosen, precision)
    if "precision" not in anew and precision == "auto":
        lost = why_not_fast(chosen, kept.precision)
        name, why = (name, lost) if lost else (kept.precision, "as before")
    wanted = compile if "compile" in anew else "on" if kept.compile else "off"
    compiled, why_compiled = _choose_compile(chosen, name, wanted, run_flops, fixed_shapes)
    if "compile" not in anew and compiled == kept.compile:
        why_compiled = "as before"
    machine = _described(chosen, (name, why), (compiled, why_compiled))
    return machine, _changes(kept, machine, device, why, why_compiled)


def _kept_device(kept: Resolved, device: str, anew: Collection[str]) -> torch.device:
    if "device" in anew or device != "auto":
        return choose_device(device)
    try:
        return choose_device(kept.device)
    except UserError:
        return choose_device("auto")


def _changes(kept: Resolved, machine: Machine, device: str, why: str, why_compiled: str) -> list[str]:
    why_device = f"there is no {kept.device} here" if device == "auto" else "as asked"
    reasons = {"device": why_device, "precision": why, "compile": why_compiled}
    before, after = kept.to_json(), machine.resolved.to_json()
    words = {True: "on", False: "off"}
    return [
        f"{name} {words.get(before[name], before[name])} -> {words.get(after[name], after[name])} ({reason})"
        for name, reason in reasons.items()
        if before[name] != after[name]
    ]


def _described(device: torch.device, precision: tuple[str, str], compiled: tuple[bool, str]) -> Machine:
    (name, why), (is_compiled, why_compiled) = precision, compiled
    threads = torch.get_num_threads()
    count = f", {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else ""
    description = f"{device}{count}, {name} ({why}), compile {'on' if is_compiled else 'off'} ({why_compiled})"
    return Machine(device, name, is_compiled, description, why, why_compiled)


def choose_device(name: str) -> torch.device:
    """The device `name`, or for "auto" the fastest available; raises `UserError` if it is unavailable."""
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


def choose_precision(device: torch.device, name: str) -> tuple[str, str]:
    """The precision `name`, or for "auto" the fastest that `device` supports; and why, in words.

    Raises `UserError` if `device` cannot use it.
    """
    if name == "auto":
        return fastest_precision(device)
    if why_not := Precision.named(name).why_not(device):
        raise UserError(f"precision {name!r} is impossible on {device} ({why_not}): choose bf16, or leave it out")
    return name, "as asked"


def _choose_compile(
    device: torch.device, precision: str, choice: str, run_flops: float, fixed_shapes: bool
) -> tuple[bool, str]:
    if choice == "off":
        return False, "as asked"
    if device.type == "cpu" and find_compiler() is None:
        return False, "there is no C++ compiler, g++ or clang++"
    if device.type not in COMPILE_PAYS_AFTER_FLOPS:
        return (True, "as asked") if choice == "on" else (False, f"not on {device.type}")
    if choice == "on":
        return True, "as asked"
    if device.type == "cpu" and precision == "fp32":
        return False, "on a CPU it gains little in fp32"  # measured: 1.0 to 1.17 times as fast, after a minute
    pays = run_flops > COMPILE_PAYS_AFTER_FLOPS[device.type]
    if pays and not fixed_shapes:
        return False, "batches have many shapes"
    return pays, "the run is long" if pays else "the run is short"


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that `device` reaches in a matrix product of some milliseconds.

    It is only used to report utilisation (MFU).
    """
    # The number of draws depends on timing, so they must not use the generator of a run.
    generator = torch.Generator(device).manual_seed(0)
    size, best = 128, 0.0
    while best < 0.005 and size < 8192:
        size *= 2
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        best = min(_seconds(lambda: (a @ b)[0, 0].item()) for _ in range(4))  # noqa: B023
    return 2 * size**3 / best


peak_flops = cache(measured_flops)
"""`measured_flops`, once per process"""


def compiled(model: nn.Module) -> nn.Module:
    """`model` under torch.compile, cached in the user's folder, so that later runs start within seconds."""
    folder = cache_folder() / "inductor"
    with suppress(OSError):  # torch's own folder does not survive a reboot
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # Autotuning pays on a GPU; a CUDA graph would overwrite its previous output.
    on_gpu = next(model.parameters(), torch.empty(0)).is_cuda
    return torch.compile(model, mode="max-autotune-no-cudagraphs" if on_gpu else None)  # type: ignore[return-value]


def keep_freed_memory() -> None:
    """Have glibc reuse the memory that a step frees: by default, large tensors are page-faulted in again each time."""
    if _set_malloc(M_MMAP_THRESHOLD, 1 << 30):
        _set_malloc(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Have glibc return the memory of large tensors at once: tensors that come and go would leave holes in its heap."""
    _set_malloc(M_MMAP_THRESHOLD, 1 << 17)


def _set_malloc(parameter: int, value: int) -> bool:
    """Set a parameter of glibc's malloc; False elsewhere."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
    return mallopt is not None and bool(mallopt(parameter, value))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
