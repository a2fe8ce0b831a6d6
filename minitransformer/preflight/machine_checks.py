"""Device, precision, compilation, optional packages and ranks."""

from __future__ import annotations

import time

import torch
from torch import nn

from minitransformer.amounts import duration
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck
from minitransformer.preflight.planned_ranks import plan
from minitransformer.toolchain import extras
from minitransformer.training.capabilities import why_not_fast
from minitransformer.training.machine import Machine, compiled
from minitransformer.training.precision import Precision


class DeviceCheck(PreflightCheck, name="device"):
    """The device that the run would use."""

    def find(self, candidate: Candidate) -> Finding:
        device = candidate.device
        if device.type == "cuda":
            return Finding(
                "ok", f"{device}, {torch.cuda.get_device_name(device)}"[:60], figures={"device": str(device)}
            )
        threads = torch.get_num_threads()
        count = f", {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else ""
        return Finding("ok", f"{device}{count}", figures={"device": str(device), "threads": threads})


class PrecisionCheck(PreflightCheck, name="precision"):
    """The precision of matrix products, and why."""

    def find(self, candidate: Candidate) -> Finding:
        machine = candidate.machine
        figures = {"precision": machine.precision}
        if lost := why_not_fast(machine.device, machine.precision):
            return Finding(
                "note", f"{machine.precision} is emulated, and slow: {lost}", "leave --precision out", figures
            )
        return Finding("ok", f"{machine.precision} ({machine.why_precision})", figures=figures)


class CompileCheck(PreflightCheck, name="compile"):
    """Whether torch.compile works here, where the run would use it."""

    def find(self, candidate: Candidate) -> Finding:
        machine = candidate.machine
        figures = {"compile": machine.compile}
        if not machine.compile:
            return Finding("ok", f"off ({machine.why_compile})", figures=figures)
        start = time.perf_counter()
        try:
            compile_small_network(machine)
        except Exception as error:  # torch's compiler, and a C++ compiler, fail in many ways
            reason = str(error).strip().partition("\n")[0]
            return Finding("problem", f"torch.compile fails here ({reason})", "give --compile off", figures)
        took = duration(time.perf_counter() - start)
        return Finding("ok", f"on ({machine.why_compile}); a small network took {took}", figures=figures)


class ExtrasCheck(PreflightCheck, name="extras"):
    """Which extras are installed, by their names; their packages with versions are among the figures."""

    def find(self, candidate: Candidate) -> Finding:
        found = extras()
        there = [extra for extra, packages in found.items() if all(packages.values())]
        lacking = [extra for extra in found if extra not in there]
        text = "; ".join(filter(None, [", ".join(there), f"without {', '.join(lacking)}" if lacking else ""]))
        return Finding("ok", text, figures={"extras": found})


class RanksCheck(PreflightCheck, name="ranks"):
    """Whether the ranks see each other, and can train this model in this way."""

    def find(self, candidate: Candidate) -> Finding:
        size, answered = candidate.ranks, candidate.answered
        plan(candidate.whole, size)
        if size == 1:
            return Finding("ok", "one process", figures={"ranks": 1})
        way = candidate.config.training.parallel.name
        text = f"a plan for {size} ranks ({way})" if answered is None else f"{answered} of {size} ranks answer ({way})"
        return Finding("ok", text, figures={"ranks": size, "answered": answered})


def compile_small_network(machine: Machine) -> None:
    """Compile a small network, and run it forward and backward."""
    network = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1)).to(machine.device)
    fast, precision = compiled(network), Precision.named(machine.precision)(machine.device)
    with precision.autocast():
        loss = fast(torch.ones(16, 32, device=machine.device)).sum()
    precision.backward(loss)
