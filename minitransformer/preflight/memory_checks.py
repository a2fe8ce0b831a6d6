"""Memory of the weights and of a training step."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from minitransformer.amounts import amount, size
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck
from minitransformer.settings import flat, with_settings

CGROUP = Path("/sys/fs/cgroup")


class ParametersCheck(PreflightCheck, name="parameters"):
    """The size of the model, of its gradients and of the optimizer's state."""

    def find(self, candidate: Candidate) -> Finding:
        memory = candidate.step_memory
        figures = {"parameters": candidate.parameters, "bytes": memory.parameters}
        figures |= {"gradient_bytes": memory.gradients, "optimizer_bytes": memory.optimizer}
        parts = f"{size(memory.parameters)}, gradients the same, optimizer {size(memory.optimizer)}"
        return Finding("ok", f"{amount(candidate.parameters)}: {parts}", figures=figures)


class MemoryCheck(PreflightCheck, name="memory"):
    """Whether a training step fits into memory; ranks on a CPU share it."""

    def find(self, candidate: Candidate) -> Finding:
        memory, device, ranks = candidate.step_memory, candidate.machine.device, candidate.ranks
        free = available_memory(device)
        if free is not None and device.type == "cpu":
            free //= ranks
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
