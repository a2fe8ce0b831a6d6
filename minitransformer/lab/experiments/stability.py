"""E8: stability of training at high learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from minitransformer.diagnostics import probe
from minitransformer.diagnostics.gradients import spikes
from minitransformer.lab.experiment import Claim, Findings, select
from minitransformer.lab.training import STUCK, TrainingExperiment, per_seed
from minitransformer.reporting.figures import intervals
from minitransformer.reporting.statistics import mean_interval
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

MARGIN, OUTLIER = "fp16-margin", "outlier-ratio"
LAYERS, WARM_UP = 12, 100
ROWS = 64
"""texts of the validation split that trained models are looked at on"""


class Stability(TrainingExperiment, name="E8"):
    """Runs at high learning rates without clipping, and the largest numbers in the models that come of them."""

    title = "Stability"
    question = "Which placements have spikes of the gradient, outliers, or numbers too large for float16?"
    source = "Kim et al. 2025 (Peri-LN, arXiv 2502.02732), sections 4.2 and 4.4"
    minutes = 14.0

    def tasks(self) -> Sequence[Task]:
        quick = self.settings.quick
        names = ("post", "pre", "peri") if quick else ("post", "pre", "peri", "residual", "deepnorm", "lns", "olmo2")
        layers, rates, steps, seeds = (6, (1e-2,), 100, 2) if quick else (LAYERS, (3e-3, 1e-2), 300, 5)
        run = {"num_layers": layers, "warmup_steps": min(WARM_UP, steps // 2), "steps": steps}
        return [
            {"residual": name, "lr": lr, "seed": seed, **run} for seed in range(seeds) for lr in rates for name in names
        ]

    def measure(self, task: Task) -> Measurement:
        trained = self.train(task)
        figures = probe(trained.model, trained.held_out(ROWS), (MARGIN, OUTLIER))
        known = {key: figure for key, figure in figures.items() if figure is not None}
        return {
            **self.record(trained),
            "spikes": sum(spikes(trained.training_curve.grad_norms)),
            MARGIN: min(figure for key, figure in known.items() if key.startswith(MARGIN)),
            OUTLIER: max(figure for key, figure in known.items() if key.startswith(OUTLIER)),
        }

    def conclude(self, results: Sequence[Result]) -> Findings:
        names, rates = (list(dict.fromkeys(run.task[choice] for run in results)) for choice in ("residual", "lr"))
        highest = select(results, {"lr": max(rates)})
        claims = {
            "Peri-LN diverges with fewer seeds than Pre-LN": lambda peri, pre: _fails(pre) - _fails(peri),
            "Peri-LN has fewer gradient spikes than Pre-LN": lambda peri, pre: pre["spikes"] - peri["spikes"],
            "Peri-LN leaves float16 more room than Pre-LN": lambda peri, pre: peri[MARGIN] - pre[MARGIN],
            "Peri-LN has smaller outliers than Pre-LN": lambda peri, pre: pre[OUTLIER] - peri[OUTLIER],
        }
        return Findings(
            criteria=[],
            claims=[
                Claim(f"{claim}, lr {max(rates):g}", per_seed(highest, ["peri", "pre"], gain))
                for claim, gain in claims.items()
            ],
            tables=[_table(names, rates, results)],
            pictures=[
                _picture(MARGIN, "65504 / largest number of the trained model", names, highest),
                _picture("spikes", "gradient spikes in a run", names, highest),
            ],
            remarks=[
                f"A seed diverges if a loss or gradient is not finite, or its last 25 steps cost {STUCK} nats or more.",
                "A spike is a gradient norm above 5 times the median of the last 50. Nothing is clipped.",
                "Numbers of all streams and sublayer outputs count, on text that was not trained on, after the last "
                "step; outliers are max|x| / median|x| of the stream after a layer, the largest over layers.",
            ],
        )


def _fails(measured: Measurement) -> float:
    return float(measured["last_loss"] >= STUCK)


def _table(names: Sequence[str], rates: Sequence[float], results: Sequence[Result]) -> Table:
    rows = []
    for lr in rates:
        for name in names:
            runs = [run.measured for run in select(results, {"residual": name, "lr": lr})]
            if runs:
                values = ([run[key] for run in runs] for key in ("last_loss", "spikes", OUTLIER, MARGIN))
                failed = f"{sum(map(_fails, runs)):.0f} of {len(runs)}"
                rows.append([name, lr, failed, *(str(mean_interval(row)) for row in values)])
    columns = ["placement", "lr", "seeds that diverge", "last loss", "gradient spikes", "outliers", "room in float16"]
    return Table("Stability by placement (95 %)", columns, rows)


def _picture(quantity: str, label: str, names: Sequence[str], results: Sequence[Result]) -> Picture:
    found = [name for name in names if select(results, {"residual": name})]
    means = [mean_interval(per_seed(results, [name], lambda run: run[quantity])) for name in found]
    values = ([getattr(mean, end) for mean in means] for end in ("mean", "low", "high"))
    draw = partial(intervals, found, *values, x_label=label, title=label.capitalize())
    return Picture(
        label.capitalize(), draw, "At the highest learning rate; means over seeds, with their 95 % intervals."
    )
