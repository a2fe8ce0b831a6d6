"""E7: the largest trainable learning rate of each placement, by depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

from minitransformer.lab.experiment import Claim, Findings, select
from minitransformer.lab.training import STUCK, TrainingCurve, TrainingExperiment, final_loss
from minitransformer.reporting.figures import heatmap
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

PLACEMENTS = (
    "post",
    "pre",
    "sandwich",
    "peri",
    "olmo2",
    "deepnorm",
    "admin",
    "b2t",
    "residual",
    "mix",
    "lns",
    "hybrid",
    "siamese",
    "keel",
)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BELOW = 1e-4
"""learning rate assigned to a placement that learns at none"""
PATIENCE = 50
"""minimum steps before a run is stopped early"""

Cell = tuple[str, int, int]
"""Placement, layers, and steps of warm-up."""


class Trainability(TrainingExperiment, name="E7"):
    """Short runs of each cell, from the highest rate down to the first at which all seeds learn."""

    title = "Trainability map"
    question = "What is the largest learning rate at which each placement learns, at each depth?"
    source = (
        "Wang et al. 2022 (DeepNorm, arXiv 2203.00555), figure 1; Xiong et al. 2020 (arXiv 2002.04745), section 3.1"
    )
    minutes = 60.0

    def tasks(self) -> Sequence[Task]:
        return self.further_tasks([])

    def further_tasks(self, results: Sequence[Result]) -> Sequence[Task]:
        quick = self.settings.quick
        names = ("post", "pre", "residual") if quick else PLACEMENTS
        depths, rates = ((4, 12), (1e-3, 1e-2)) if quick else ((4, 8, 12, 24), RATES)
        warmups, seeds, steps = ((1,), 1, 100) if quick else ((1, 100), 2, 150)
        runs: dict[Cell, list[Result]] = {cell: [] for cell in itertools.product(names, depths, warmups)}
        for run in results:
            runs[_cell(run)].append(run)
        next_rates = {cell: _next_rate(runs[cell], rates, seeds) for cell in runs}
        return [
            {"residual": name, "num_layers": layers, "lr": lr, "warmup_steps": warmup, "steps": steps, "seed": seed}
            for seed in range(seeds)
            for (name, layers, warmup), lr in next_rates.items()
            if lr is not None
        ]

    def measure(self, task: Task) -> Measurement:
        blind = math.log(self.text.tokenizer.vocab_size)

        def is_hopeless(training_curve: TrainingCurve) -> bool:
            return len(training_curve.losses) >= PATIENCE and final_loss(training_curve.losses) > blind

        return self.record(self.train(task, is_hopeless))

    def conclude(self, results: Sequence[Result]) -> Findings:
        names, depths, warmups = (
            list(dict.fromkeys(run.task[choice] for run in results))
            for choice in ("residual", "num_layers", "warmup_steps")
        )
        places = [(layers, warmup) for warmup in warmups for layers in sorted(depths)]
        largest = {(name, *place): _largest_rate(results, (name, *place)) for name in names for place in places}
        labels = [f"{layers} layers, {'warm-up' if warmup > 1 else 'none'}" for layers, warmup in places]
        rows = [[name, *(_rate(largest[name, *place]) for place in places)] for name in names]
        draw = partial(
            heatmap,
            [[math.log10(largest[name, *place] or math.nan) for place in places] for name in names],
            rows=names,
            columns=labels,
            title="Largest learning rate at which all seeds learn (dash: none of those tried)",
            value_label="log₁₀ of the learning rate",
            format_spec=".1f",
        )
        return Findings(
            criteria=[],
            claims=_claims(results, max(depths)),
            tables=[Table("Largest learning rate at which all seeds learn", ["placement", *labels], rows)],
            pictures=[Picture("Trainability map", draw, "Warm-up is 100 steps, and the rate constant after it.")],
            remarks=[
                f"A run learns if the mean loss of its last 25 steps is below {STUCK} nats a character: one that is "
                "merely slow counts as one that is stuck.",
                "Below the highest rate at which all seeds learn, none is tried.",
                f"After {PATIENCE} steps, a run whose last 25 are worse than a guess among all characters is stopped.",
                f"For the claims, a placement that learns at none of the rates counts as one of {BELOW:g}.",
                "So few seeds draw the map and decide nothing: the claims stay open, and say how far apart rates are.",
            ],
        )


def _largest_rate(results: Sequence[Result], cell: Cell) -> float:
    """At which all seeds of the cell learn; 0 if there is none."""
    name, layers, warmup = cell
    runs = select(results, {"residual": name, "num_layers": layers, "warmup_steps": warmup})
    failed = {run.task["lr"] for run in runs if run.measured["last_loss"] >= STUCK}
    return max((run.task["lr"] for run in runs if run.task["lr"] not in failed), default=0.0)


def _next_rate(runs: Sequence[Result], rates: Sequence[float], seeds: int) -> float | None:
    """The highest rate that some seed has not tried; None below one at which all learn."""
    for lr in sorted(rates, reverse=True):
        losses = [run.measured["last_loss"] for run in runs if run.task["lr"] == lr]
        if len(losses) < seeds:
            return lr
        if max(losses) < STUCK:
            break
    return None


def _rate(lr: float) -> str:
    return f"{lr:g}" if lr else "none"


def _claims(results: Sequence[Result], layers: int) -> list[Claim]:
    post = ("post", layers, 1)
    claims: list[tuple[str, Cell]] = [
        (f"{title} learns at larger rates than Post-LN, {layers} layers, no warm-up", (name, layers, 1))
        for name, title in (("pre", "Pre-LN"), ("deepnorm", "DeepNorm"), ("residual", "ResiDual"), ("admin", "Admin"))
    ]
    claims += [(f"warm-up lets Post-LN learn at larger rates, {layers} layers", ("post", layers, 100))]
    return [Claim(claim, _decades(results, better, post), " decades") for claim, better in claims]


def _decades(results: Sequence[Result], better: Cell, worse: Cell) -> list[float]:
    """By how many powers of ten the largest rate of one cell is above that of the other, seed by seed."""
    gains = []
    for seed in sorted({run.task["seed"] for run in results}):
        runs = select(results, {"seed": seed})
        sides = [[run for run in runs if _cell(run) == cell] for cell in (better, worse)]
        if all(sides):
            rates = [_largest_rate(side, cell) or BELOW for side, cell in zip(sides, (better, worse), strict=True)]
            gains.append(math.log10(rates[0] / rates[1]))
    return gains


def _cell(run: Result) -> Cell:
    return run.task["residual"], run.task["num_layers"], run.task["warmup_steps"]
