"""Memory of the weights and of a training step."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from minitransformer.amounts import amount, size
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck
from minitransformer.preflight.planned_ranks import plan
from minitransformer.settings import flat, with_settings

CPU = torch.device("cpu")
CGROUP = Path("/sys/fs/cgroup")


class ParametersCheck(PreflightCheck, name="parameters"):
    """The size of the model, of its gradients and of the optimizer's state."""

    def find(self, candidate: Candidate) -> Finding:
        memory = candidate.step_memory
        figures = {"parameters": candidate.parameters, "bytes": memory.parameters}
        figures |= {"gradient_bytes": memory.gradients, "optimizer_bytes": memory.optimizer}
        gradients = "the same" if memory.gradients == memory.parameters else size(memory.gradients)
        parts = f"{size(memory.parameters)}, gradients {gradients}, optimizer {size(memory.optimizer)}"
        return Finding("ok", f"{amount(candidate.parameters)}: {parts}", figures=figures)


class MemoryCheck(PreflightCheck, name="memory"):
    """Whether a training step fits into memory; ranks on a CPU share it."""

    def find(self, candidate: Candidate) -> Finding:
        memory, ranks, free = candidate.step_memory, candidate.ranks, free_memory(candidate)
        figures: dict[str, int | None] = {"bytes": memory.total, "activation_bytes": memory.activations}
        figures |= {"heap_bytes": memory.holes, "available_bytes": free}
        heap = f", heap {size(memory.holes)}" if memory.holes else ""
        text = f"{size(memory.total)}{' a rank' if ranks > 1 else ''}: activations {size(memory.activations)}{heap}"
        if free is None:
            return Finding("note", f"{text}; what is free is unknown", "watch the first steps", figures)
        text = f"{text}, of {size(free)} free"
        if memory.total > free:
            return Finding("problem", text, smaller_batch(candidate, free), figures)
        return Finding("ok", text, figures=figures)


class SavingCheck(PreflightCheck, name="saving"):
    """Whether the host has room for the copy from which a checkpoint is written while training goes on."""

    def find(self, candidate: Candidate) -> Finding:
        copy, copies, free = candidate.step_memory.copy, host_copies(candidate), available_memory(CPU)
        figures = {"bytes": copy, "bytes_of_all_ranks": copies, "available_bytes": free}
        text = f"{size(copies)} of host memory for copies"
        if candidate.machine.device.type == "cpu":
            return Finding("ok", f"{text}, which a step leaves free", figures=figures)
        if free is None:
            return Finding("note", f"{text}; what is free is unknown", "watch the first checkpoint", figures)
        text = f"{text}, of {size(free)} free"
        if copies > free:
            return Finding("problem", text, "choose a smaller model, or more nodes with --parallel fsdp", figures)
        return Finding("ok", text, figures=figures)


def host_copies(candidate: Candidate) -> int:
    """Bytes of the copies of all ranks of this machine that write checkpoints."""
    all_write = plan(candidate.whole, candidate.ranks).shards_weights
    return candidate.step_memory.copy * (candidate.ranks_here if all_write else 1)


def free_memory(candidate: Candidate) -> int | None:
    """Bytes that a step of a rank may allocate on its device; None if unknown. On a CPU, beside the copies."""
    device = candidate.machine.device
    free = available_memory(device)
    if free is None or device.type != "cpu":
        return free
    return max(0, free - host_copies(candidate)) // candidate.ranks_here


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still allocate on `device`; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return min([kilobytes * 1024, *_left_in_container()])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def _left_in_container() -> list[int]:
    """Memory left under the limit of this control group, whose file cache can be dropped."""
    with suppress(OSError, ValueError, StopIteration):
        most = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return [most - used + cached]
    return []


def smaller_batch(candidate: Candidate, free: int) -> str:
    """The flags of a smaller micro-batch that fits into `free` bytes, with as many tokens per step."""
    config = candidate.whole
    name = "batch_size" if config.data.dataset.variant.cuts_text else "batch_tokens"
    while (now := flat(config)[name]) >= 2 and now % 2 == 0:
        accumulation = 2 * config.training.grad_accumulation
        config = with_settings(config, {name: now // 2, "grad_accumulation": accumulation})
        if (total := candidate.memory(config).total) <= free:
            flags = f"--{name.replace('_', '-')} {now // 2} --grad-accumulation {accumulation}"
            return f"give {flags}, which needs {size(total)}"
    return "choose a smaller model (--num-layers, --d-model), or a smaller --context-length"
