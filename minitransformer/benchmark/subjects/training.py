"""Training throughput and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from minitransformer.benchmark.case import Absent, BenchSetting, Case, Contestant, Subject, Work, missing
from minitransformer.benchmark.workers import repeated
from minitransformer.toolchain import find_compiler

MEMORY_STEPS = 2
"""the second step has the optimizer state"""


class Training(Subject, name="training"):
    """Training throughput of whole steps: batch, loss, gradient, update."""

    about = "training throughput of whole steps, in tokens/s"

    def cases(self) -> Iterator[Case]:
        yield Case.of("training step", "tokens/s", contestants(self.setting, _speed))


class PeakMemory(Subject, name="memory"):
    """Peak resident memory of a training process, torch included; on a GPU, torch's peak there."""

    about = "peak memory of a training process"

    def cases(self) -> Iterator[Case]:
        entries = contestants(self.setting, _memory)
        yield Case.of("peak memory of training", "MB", entries, lower_is_better=True, fresh=True)


PrepareTraining = Callable[[BenchSetting, str, dict[str, Any], str], Work]


def contestants(setting: BenchSetting, prepare: PrepareTraining) -> Iterator[Contestant | Absent]:
    """All contestants for training; `prepare(setting, function of stepping, its arguments, precision)` prepares one."""

    def entry(name: str, step: str, precision: str, arguments: dict[str, Any], *, base: bool = False) -> Contestant:
        return Contestant(name, partial(prepare, setting, step, arguments, precision), base)

    no_compiler = _no_compiler(setting.device)
    if setting.against:
        precision = "bf16" if setting.device.startswith("cuda") else "fp32"
        yield entry("nanoGPT", "nanogpt_step", precision, {"compiled": False}, base=True)
        name = "nanoGPT compiled"
        yield no_compiler(name) if no_compiler else entry(name, "nanogpt_step", precision, {"compiled": True})
    else:
        yield Absent("nanoGPT", "give a checkout with --against")
    for precision in ("fp32", "bf16"):
        name = f"transformers {precision}"
        yield missing("transformers", name) or entry(
            name, "transformers_step", precision, {"precision": precision}, base=True
        )
    for precision in ("fp32", "bf16", *_float8(setting.device)):
        arguments = {"precision": precision}
        yield entry(f"ours {precision}", "our_step", precision, {**arguments, "compiled": False})
        name = f"ours {precision} compiled"
        yield no_compiler(name) if no_compiler else entry(name, "our_step", precision, {**arguments, "compiled": True})


def _float8(device: str) -> tuple[str, ...]:
    """FP8, on GPUs only; on a CPU it is emulated."""
    if not device.startswith("cuda"):
        return ()
    import torch

    from minitransformer.training.precision import FP8

    return () if FP8.why_not(torch.device(device)) else ("fp8",)


def _no_compiler(device: str) -> Callable[[str], Absent] | None:
    """A function that marks compiled contestants as absent, if there is no compiler."""
    if device == "cpu" and find_compiler() is None:
        return lambda name: Absent(name, "torch.compile needs a C++ compiler, g++ or clang++")
    return None


def _speed(setting: BenchSetting, name: str, arguments: dict[str, Any], precision: str) -> Work:
    from minitransformer.benchmark import ours, stepping

    step = getattr(stepping, name)(setting, **arguments)
    tokens = setting.shape.batch_size * setting.shape.context_length
    finish = partial(ours.synchronise, setting.device)
    return Work(partial(repeated, step, tokens, setting.seconds, finish), ours.training_cost(setting.shape, precision))


def _memory(setting: BenchSetting, name: str, arguments: dict[str, Any], precision: str) -> Work:
    def sample() -> float:
        from minitransformer.benchmark import ours, stepping

        step = getattr(stepping, name)(setting, **arguments)
        for _ in range(MEMORY_STEPS):
            step()
        return ours.peak_on(setting.device)

    return Work(sample)
