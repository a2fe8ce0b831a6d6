"""E9: which placement learns best, each at its own learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minitransformer.errors import UserError
from minitransformer.lab.experiment import Criterion, Findings, Measurement, Picture, Result, Table, Task, select
from minitransformer.lab.experiments.trainability import PLACEMENTS
from minitransformer.lab.figures import intervals
from minitransformer.lab.statistics import Ranking, mean_interval, paired_difference, ranking
from minitransformer.lab.training import TrainingExperiment, on_trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING = 100
"""seeds from here on choose the learning rate; those below are ranked"""
LOSS = "validation_loss"
CLAIMS = {
    "lns": "LNS (arXiv 2502.05795)",
    "hybrid": "HybridNorm (arXiv 2503.04598)",
    "residual": "ResiDual (arXiv 2304.14802)",
    "mix": "Mix-LN (arXiv 2412.13795)",
    "peri": "Peri-LN (arXiv 2502.02732)",
}
"""placements whose papers found them better than Pre-LN"""


class PlacementRanking(TrainingExperiment, name="E9"):
    """Every placement at every rate of a grid; two seeds choose the rate, and others, paired, are ranked at it."""

    title = "Ranking"
    question = "Which placement has the lowest validation loss, each at its own best learning rate?"
    source = "the comparisons of arXiv 2304.14802, 2412.13795, 2502.05795, 2502.02732 and 2503.04598 with Pre-LN"
    minutes = 45.0

    def tasks(self) -> Sequence[Task]:
        quick = self.settings.quick
        names = ("post", "pre", "residual") if quick else PLACEMENTS
        layers, steps, rates = (4, 100, (3e-3, 1e-2)) if quick else (6, 400, (1e-3, 3e-3, 1e-2))
        seeds = [TUNING, 0, 1] if quick else [TUNING, TUNING + 1, *range(5)]
        run = {"num_layers": layers, "steps": steps, "schedule": "inverse-sqrt", "warmup_steps": steps // 4}
        return [{"residual": name, "lr": lr, "seed": seed, **run} for seed in seeds for name in names for lr in rates]

    def measure(self, task: Task) -> Measurement:
        trained = self.train(task)
        return {**self.record(trained), LOSS: trained.validation_loss()}

    def conclude(self, results: Sequence[Result]) -> Findings:
        """Raises `UserError` as long as no placement has been tuned and ranked."""
        rates = _tuned(results)
        losses = _ranked(results, rates)
        if not losses:
            raise UserError("no placement has been tuned and ranked yet: run E9 to its end")
        outcome = ranking(losses)
        claims = [(name, who) for name, who in CLAIMS.items() if name in losses and "pre" in losses]
        edges = [name for name in outcome.order if rates[name] in (min(_grid(results)), max(_grid(results)))]
        seeds, won = f"{outcome.seeds} paired seeds", True if outcome.winner else None
        remarks = [
            "Runs with the same seed share their batches and the draws of their weights. The learning rate was chosen "
            "by other seeds, for each placement among the same rates.",
            str(outcome),
        ]
        if edges:
            remarks.append(
                f"The best rate is at the edge of the grid, and a better one may lie beyond: {', '.join(edges)}."
            )
        return Findings(
            criteria=[
                Criterion("one placement is better than every other", f"{outcome} {seeds}.", won, must_hold=False),
                *(
                    on_trial(f"{who} reaches a lower loss than Pre-LN", _gains(losses["pre"], losses[name]), " nats")
                    for name, who in claims
                ),
            ],
            tables=[_places(outcome, losses, rates), _pairs(outcome)],
            pictures=[_picture(outcome, losses)],
            remarks=remarks,
        )


def _grid(results: Sequence[Result]) -> list[float]:
    return list(dict.fromkeys(run.task["lr"] for run in results))


def _tuned(results: Sequence[Result]) -> dict[str, float]:
    """The best rate of each placement, by the mean loss of all seeds for tuning; without those that lack some."""
    tuning = [run for run in results if run.task["seed"] >= TUNING]
    seeds = {run.task["seed"] for run in tuning}
    best = {}
    for name in dict.fromkeys(run.task["residual"] for run in tuning):
        rows = {lr: select(tuning, {"residual": name, "lr": lr}) for lr in _grid(results)}
        if all(len(runs) == len(seeds) for runs in rows.values()):
            best[name] = min(rows, key=lambda lr: sum(run.measured[LOSS] for run in rows[lr]))
    return best


def _ranked(results: Sequence[Result], rates: dict[str, float]) -> dict[str, list[float]]:
    """The losses of each placement at its best rate, one for each seed that all of them have."""
    found = {
        name: {
            run.task["seed"]: run.measured[LOSS]
            for run in select(results, {"residual": name, "lr": lr})
            if run.task["seed"] < TUNING
        }
        for name, lr in rates.items()
    }
    shared = sorted(set.intersection(*map(set, found.values()))) if found else []
    return {name: [losses[seed] for seed in shared] for name, losses in found.items()} if shared else {}


def _gains(reference: Sequence[float], losses: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(reference, losses, strict=True)]


def _places(outcome: Ranking, losses: dict[str, list[float]], rates: dict[str, float]) -> Table:
    best = losses[outcome.order[0]]
    rows = []
    for name in outcome.order:
        behind = None if losses[name] is best or outcome.seeds < 2 else str(paired_difference(losses[name], best))
        rows.append([name, rates[name], str(mean_interval(losses[name])), behind])
    return Table(
        "Placements by validation loss", ["placement", "lr", "loss (95 %)", "behind the best, paired (95 %)"], rows
    )


def _pairs(outcome: Ranking) -> Table:
    rows = [
        [pair.first, pair.second, str(pair.difference), f"{pair.p:.2g}", "yes" if outcome.separates(pair) else "no"]
        for pair in outcome.comparisons
    ]
    return Table(
        "All pairs", ["first", "second", "first − second (95 %)", "p, corrected for all pairs", "differ"], rows
    )


def _picture(outcome: Ranking, losses: dict[str, list[float]]) -> Picture:
    reference = "pre" if "pre" in losses else outcome.order[0]
    title = f"Validation loss relative to {reference}, nats a character"

    def draw() -> Figure:
        others = [name for name in outcome.order if name != reference]
        gaps = [mean_interval(_gains(losses[name], losses[reference])) for name in others]
        low, high = [gap.low for gap in gaps], [gap.high for gap in gaps]
        means = [gap.mean for gap in gaps]
        return intervals(others, means, low, high, x_label="difference", title=title, reference=0.0)

    return Picture(title, draw, "Paired differences with 95 % intervals, each placement at its own best rate.")
