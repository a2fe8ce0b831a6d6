"""E6: the contribution of deep layers after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from minitransformer.diagnostics import probe
from minitransformer.lab.experiment import Claim, Criterion, Findings, curve, expected, select
from minitransformer.lab.training import TrainingExperiment, per_seed
from minitransformer.reporting.figures import curves
from minitransformer.reporting.statistics import mean_interval
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

LOOKS = {
    "angular-distance": "angular distance of a layer's input and output",
    "stream-variance": "E‖x‖² after a layer",
    "skipped-layer": "rise of the loss without a layer (nats)",
}
ANGLE, SIZE, SKIPPED, LOSS = *LOOKS, "validation_loss"
LAYERS = 12
DEEP = 3
"""last layers, which the claims are about"""
VALIDATION_ROWS = 256
"""number of held-out texts of 64 characters for the diagnostics"""


class UseOfDepth(TrainingExperiment, name="E6"):
    """Diagnostics of each layer of trained 12-layer models on held-out text."""

    title = "Use of depth"
    question = "Do the deep layers of a trained model change what passes through them, and does it help?"
    source = "Xie et al. 2023 (ResiDual, arXiv 2304.14802), section 2; Sun et al. 2025 (arXiv 2502.05795), figures 2-4"
    minutes = 12.0

    def tasks(self) -> Sequence[Task]:
        quick = self.settings.quick
        names = ("pre", "residual", "lns") if quick else ("pre", "residual", "lns", "post", "deepnorm")
        steps, seeds = (150, 1) if quick else (600, 5)
        run = {"num_layers": LAYERS, "lr": 1e-3, "schedule": "inverse-sqrt", "warmup_steps": 100, "steps": steps}
        return [{"residual": name, "seed": seed, **run} for seed in range(seeds) for name in names]

    def measure(self, task: Task) -> Measurement:
        trained = self.train(task)
        loss = trained.held_out(VALIDATION_ROWS)
        figures = probe(trained.model, loss, tuple(LOOKS))
        layers = {name: [_number(figures[f"{name}/stack.{layer}"]) for layer in range(LAYERS)] for name in LOOKS}
        with torch.no_grad():
            return {**self.record(trained), **layers, "validation_loss": loss().item()}

    def conclude(self, results: Sequence[Result]) -> Findings:
        names = list(dict.fromkeys(run.task["residual"] for run in results))
        return Findings(
            criteria=self._reproduced(results),
            claims=self._on_trial(results),
            tables=[_summary(names, results), _by_layer(names, results)],
            pictures=[_picture(look, names, results) for look in LOOKS],
            remarks=[
                "x is the normalised stream of ResiDual and of Post-LN, and the plain one of Pre-LN and LNS; distances "
                "are of what a whole layer, attention and feed-forward network, does to it.",
                "The angle is arccos(cos(x, x′)) / π, of x before and x′ after a layer, mean over characters.",
            ]
            + ["The quick version trains too briefly for the criteria, which stay open."] * self.settings.quick,
        )

    def _reproduced(self, results: Sequence[Result]) -> list[Criterion]:
        quick = self.settings.quick
        return [
            expected(
                "Pre-LN's last layer turns x at most 0.4 times as far as its first",
                per_seed(results, ["pre"], lambda pre: pre[ANGLE][-1] / pre[ANGLE][0]),
                at_most=0.4,
                is_open=quick,
            ),
            expected(
                "every layer of ResiDual turns x by 0.15 π or more",
                per_seed(results, ["residual"], lambda dual: min(dual[ANGLE])),
                at_least=0.15,
                is_open=quick,
            ),
            expected(
                f"ResiDual's last {DEEP} layers turn x at least 3 times as far as Pre-LN's",
                per_seed(results, ["residual", "pre"], lambda dual, pre: _deep(dual, ANGLE) / _deep(pre, ANGLE)),
                at_least=3,
                is_open=quick,
            ),
            expected(
                "LNS's last E‖x‖² is at most half of Pre-LN's",
                per_seed(results, ["lns", "pre"], lambda lns, pre: lns[SIZE][-1] / pre[SIZE][-1]),
                at_most=0.5,
                is_open=quick,
            ),
        ]

    def _on_trial(self, results: Sequence[Result]) -> list[Claim]:
        return [
            Claim(
                f"LNS revives deep layers: leaving out one of the last {DEEP} costs more than with Pre-LN",
                per_seed(results, ["lns", "pre"], lambda lns, pre: _deep(lns, SKIPPED) - _deep(pre, SKIPPED)),
                " nats",
            ),
            Claim(
                "ResiDual's diversity buys loss: its validation loss is below Pre-LN's",
                per_seed(results, ["pre", "residual"], lambda pre, dual: pre[LOSS] - dual[LOSS]),
                " nats",
            ),
        ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _deep(measured: Measurement, look: str) -> float:
    return sum(measured[look][-DEEP:]) / DEEP


def _summary(names: Sequence[str], results: Sequence[Result]) -> Table:
    quantities: dict[str, Callable[[Measurement], float]] = {
        "validation loss": lambda run: run[LOSS],
        "angle of the first layer": lambda run: run[ANGLE][0],
        f"mean angle of the last {DEEP}": lambda run: _deep(run, ANGLE),
        "last E‖x‖²": lambda run: run[SIZE][-1],
        f"mean cost without one of the last {DEEP}": lambda run: _deep(run, SKIPPED),
    }
    rows = [
        [name, *(str(mean_interval(per_seed(results, [name], value))) for value in quantities.values())]
        for name in names
    ]
    return Table("Trained models by placement (95 %)", ["placement", *quantities], rows)


def _by_layer(names: Sequence[str], results: Sequence[Result]) -> Table:
    means = {
        name: np.mean([[run.measured[look] for look in LOOKS] for run in select(results, {"residual": name})], 0)
        for name in names
    }
    rows = [[name, layer + 1, *map(float, means[name][:, layer])] for name in names for layer in range(LAYERS)]
    return Table("Layer by layer, means over seeds", ["placement", "layer", *LOOKS.values()], rows)


def _picture(look: str, names: Sequence[str], results: Sequence[Result]) -> Picture:
    x = range(1, LAYERS + 1)
    lines = [curve(name, x, [run.measured[look] for run in select(results, {"residual": name})]) for name in names]
    title = f"{LOOKS[look]}, after training"
    draw = partial(curves, lines, x_label="layer", y_label=LOOKS[look], title=title, log_y=look == SIZE)
    return Picture(f"{LOOKS[look]} by layer", draw, "Means over seeds, with their 95 % intervals.")
