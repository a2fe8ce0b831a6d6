"""E9: which placement has the lowest loss, each at its own best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from minitransformer.architecture.residual import HybridNorm
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import SMALLEST_DIFFERENCE
from minitransformer.lab.experiment import Claim, Criterion, Findings, select
from minitransformer.lab.experiments.trainability import PLACEMENTS
from minitransformer.lab.training import TrainingExperiment
from minitransformer.reporting.figures import intervals
from minitransformer.reporting.statistics import Ranking, mean_interval, paired_difference, ranking
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""learning rates that may be tried"""
LOSS = "validation_loss"
PRE_LN_QKV = "pre, QKV-norm"
ROWS: dict[str, Task] = {name: {"residual": name} for name in PLACEMENTS} | {
    PRE_LN_QKV: {**HybridNorm.asks_for, "residual": "pre"}
}
"""what is ranked, and which choices of a task it is: placements, and Pre-LN with all that HybridNorm has beside it"""
CLAIMS = {
    "lns": "LNS (arXiv 2502.05795)",
    "hybrid": "HybridNorm (arXiv 2503.04598)",
    "residual": "ResiDual (arXiv 2304.14802)",
    "mix": "Mix-LN (arXiv 2412.13795)",
    "peri": "Peri-LN (arXiv 2502.02732)",
}
"""placements whose papers found them better than Pre-LN"""
COMPARISONS = [(name, "pre", f"{who} reaches a lower loss than Pre-LN") for name, who in CLAIMS.items()] + [
    (
        "hybrid",
        PRE_LN_QKV,
        "HybridNorm reaches a lower loss than Pre-LN with the same normalisation of queries, keys and values",
    )
]
"""claims that the first has a lower loss than the second"""


@dataclass(frozen=True)
class Form:
    """How large the experiment is."""

    names: Sequence[str]
    layers: int
    steps: int
    rates: Sequence[float]
    """learning rates that are always tried"""
    tuning: Sequence[int]
    """seeds that choose the learning rate"""
    ranked: Sequence[int]
    """other seeds, which train at the chosen learning rate only"""


FULL = Form(tuple(ROWS), layers=6, steps=400, rates=LADDER[2:5], tuning=(100, 101), ranked=range(5))
QUICK = Form(("post", "pre", "residual"), layers=4, steps=100, rates=LADDER[3:5], tuning=(100,), ranked=range(2))


class PlacementRanking(TrainingExperiment, name="E9"):
    """Every row at some learning rates with the tuning seeds, extended until the best one is interior; then the other
    seeds, paired, at each row's best learning rate."""

    title = "Ranking"
    question = "Which placement has the lowest validation loss, each at its own best learning rate?"
    source = "the comparisons of arXiv 2304.14802, 2412.13795, 2502.05795, 2502.02732 and 2503.04598 with Pre-LN"
    minutes = 45.0

    @property
    def form(self) -> Form:
        """What the settings ask for."""
        return QUICK if self.settings.quick else FULL

    def tasks(self) -> Sequence[Task]:
        form = self.form
        return [self._task(name, lr, seed) for seed in form.tuning for name in form.names for lr in form.rates]

    def further_tasks(self, results: Sequence[Result]) -> Sequence[Task]:
        further = []
        for name, losses in self._tuned(results).items():
            best = min(losses, key=losses.__getitem__)
            if missing := _beside(best) - set(losses):
                further += [self._task(name, lr, seed) for lr in sorted(missing) for seed in self.form.tuning]
            else:
                further += [self._task(name, best, seed) for seed in self.form.ranked]
        return sorted(further, key=lambda task: task["seed"])

    def _task(self, name: str, lr: float, seed: int) -> Task:
        layers, steps = self.form.layers, self.form.steps
        run = {"num_layers": layers, "steps": steps, "schedule": "inverse-sqrt", "warmup_steps": steps // 4}
        return {**ROWS[name], "lr": lr, "seed": seed, **run}

    def _tuned(self, results: Sequence[Result]) -> dict[str, dict[float, float]]:
        """By placement, the mean loss of the seeds for tuning at each rate; without what lacks some."""
        losses: dict[str, dict[float, list[float]]] = {name: {} for name in self.form.names}
        for run in results:
            if run.task["seed"] in self.form.tuning:
                losses[_row(run.task)].setdefault(run.task["lr"], []).append(run.measured[LOSS])
        seeds = len(self.form.tuning)
        means = {
            name: {lr: sum(row) / seeds for lr, row in rows.items() if len(row) == seeds}
            for name, rows in losses.items()
        }
        return {name: rates for name, rates in means.items() if set(self.form.rates) <= set(rates)}

    def _ranked(self, results: Sequence[Result]) -> tuple[dict[str, float], dict[str, list[float]]]:
        """By placement, its best rate, and its losses there, one for each seed that all of them have."""
        found, rates = {}, {}
        for name, tuned in self._tuned(results).items():
            best = min(tuned, key=tuned.__getitem__)
            runs = [run for run in select(results, {"lr": best}) if _row(run.task) == name]
            losses = {run.task["seed"]: run.measured[LOSS] for run in runs if run.task["seed"] in self.form.ranked}
            if losses:
                rates[name], found[name] = best, losses
        shared = sorted(set.intersection(*map(set, found.values()))) if found else []
        return rates, {name: [losses[seed] for seed in shared] for name, losses in found.items()} if shared else {}

    def measure(self, task: Task) -> Measurement:
        trained = self.train(task)
        return {**self.record(trained), LOSS: trained.validation_loss()}

    def conclude(self, results: Sequence[Result]) -> Findings:
        """Raises `UserError` as long as no placement has been tuned and ranked."""
        rates, losses = self._ranked(results)
        if not losses:
            raise UserError("no placement has been tuned and ranked yet: run E9 to its end")
        outcome = ranking(losses, smallest=SMALLEST_DIFFERENCE)
        claims = [(a, b, claim) for a, b, claim in COMPARISONS if a in losses and b in losses]
        ends = [name for name in outcome.order if rates[name] in (LADDER[0], LADDER[-1])]
        seeds, won = f"{outcome.seeds} paired seeds", True if outcome.winner else None
        remarks = [
            "Runs with the same seed share their batches and the draws of their weights. The learning rate was chosen "
            f"by other seeds, for each placement among {', '.join(f'{lr:g}' for lr in self.form.rates)} and, while the "
            f"best was the lowest or the highest tried, the next one of {', '.join(f'{lr:g}' for lr in LADDER)}.",
            f"'{PRE_LN_QKV}' is Pre-LN with HybridNorm's norm of queries, keys and values and its initial weights: "
            "what HybridNorm gains over it comes from where its norms stand.",
            str(outcome),
        ]
        if ends:
            remarks.append(
                f"The best rate is the last that may be tried, and a better may lie beyond: {', '.join(ends)}."
            )
        return Findings(
            criteria=[
                Criterion("one placement is better than every other", f"{outcome} {seeds}.", won, must_hold=False),
            ],
            claims=[Claim(claim, _gains(losses[worse], losses[better]), " nats") for better, worse, claim in claims],
            tables=[_places(outcome, losses, rates), _pairs(outcome)],
            pictures=[_picture(outcome, losses)],
            remarks=remarks,
        )


def _row(task: Task) -> str:
    """Which of ROWS a task belongs to."""
    choices = {choice for row in ROWS.values() for choice in row}
    asked = {choice: value for choice, value in task.items() if choice in choices}
    return next(name for name, row in ROWS.items() if row == asked)


def _beside(lr: float) -> set[float]:
    """The rates of the ladder next to `lr`."""
    place = LADDER.index(lr)
    return {*LADDER[max(place - 1, 0) : place], *LADDER[place + 1 : place + 2]}


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
    others = [name for name in outcome.order if name != reference]
    gaps = [mean_interval(_gains(losses[name], losses[reference])) for name in others]
    ends = [gap.low for gap in gaps], [gap.high for gap in gaps]
    means = [gap.mean for gap in gaps]
    draw = partial(intervals, others, means, *ends, x_label="difference", title=title, reference=0.0)
    return Picture(title, draw, "Paired differences with 95 % intervals, each placement at its own best rate.")
