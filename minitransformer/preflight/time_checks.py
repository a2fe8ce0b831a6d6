"""The time to the last step."""

from __future__ import annotations

import time

from minitransformer.amounts import amount, duration
from minitransformer.models.model import build_model, count_flops
from minitransformer.preflight.candidate import Candidate
from minitransformer.preflight.check import Finding, PreflightCheck
from minitransformer.training.learner import Learner
from minitransformer.training.machine import Machine, peak_flops
from minitransformer.training.precision import Precision
from minitransformer.training.validation import FASTER, most_tokens

UTILISATION = 0.4
"""throughput of training relative to that of a matrix product"""
SECONDS = 2.0
"""time to measure steps for; slower steps are modelled"""


class TimeCheck(PreflightCheck, name="time"):
    """How long the training would take."""

    def find(self, candidate: Candidate) -> Finding:
        config = candidate.whole
        seconds, how = modelled_step(candidate), "modelled"
        if seconds < SECONDS / 4 and candidate.ranks == 1 and candidate.data.prepared is not None:
            seconds, how = measured_step(candidate), "measured"
        total = seconds * candidate.steps_left * (1 + validation_share(candidate))
        speed = config.tokens_per_step / seconds
        figures = {"seconds": total, "seconds_per_step": seconds, "tokens_per_second": speed, "speed": how}
        return Finding("ok", f"{duration(total)} at {amount(speed)} tokens/s ({how}, not compiled)", "", figures)


def modelled_step(candidate: Candidate) -> float:
    """Seconds of a step by its FLOPs, at a fixed share of the throughput of a matrix product."""
    config, machine = candidate.whole, candidate.machine
    flops = count_flops(config.model, config.sequence_length) * config.tokens_per_step
    peak = peak_flops(machine.device, Precision.named(machine.precision).dtype)
    return flops / (UTILISATION * peak * candidate.ranks)


def measured_step(candidate: Candidate) -> float:
    """Seconds of a step, as the mean of those that fit into `SECONDS`; the first one is not counted."""
    config, device = candidate.whole, candidate.machine.device
    machine = Machine(device, candidate.machine.precision, False, "")
    model = build_model(config.model).to(device).train()
    learner = Learner(config, model, candidate.loader(config), machine)
    learner.step(learner.next_batches()).loss.item()
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - start < SECONDS:
        learner.step(learner.next_batches()).loss.item()
        steps += 1
    return (time.perf_counter() - start) / steps


def validation_share(candidate: Candidate) -> float:
    """The time of validations relative to that of training."""
    config = candidate.whole
    whole = 0 if candidate.data.prepared is None else candidate.data.prepared.num_tokens("validation")
    some = min(most_tokens(config) or whole, whole)
    rounds = (config.training.steps - 1) // config.training.eval_every
    return (rounds * some + whole) / (FASTER * config.training.steps * config.tokens_per_step)
