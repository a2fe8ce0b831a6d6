"""E5: which placements learn without warm-up."""

from __future__ import annotations

from collections.abc import Sequence

from minitransformer.lab.experiment import Criterion, Findings, expected, select
from minitransformer.lab.training import STUCK, TrainingExperiment, loss_curve
from minitransformer.reporting.figures import Curve, curves
from minitransformer.reporting.statistics import mean_interval
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

CELLS = ((6, 3e-3), (8, 3e-3), (12, 1e-3))
"""layers, and the highest learning rate"""
EXPECTED = {(6, 3e-3): (2.48, 0.1), (8, 3e-3): (2.53, 0.1), (12, 1e-3): (2.68, 0.2)}
"""Nats a character that Post-LN reached with warm-up when the protocol was written, with few seeds, and how far the
mean may be from it: at 12 layers, where the warm-up hardly ends in time, seeds differ by 0.2."""
WITHOUT, WITH, DECAY = "no warm-up", "warm-up", "decay at once"
SCHEDULES = {
    WITHOUT: {"schedule": "constant", "warmup_steps": 0},
    WITH: {"schedule": "inverse-sqrt", "warmup_steps": 400},
    DECAY: {"schedule": "inverse-sqrt", "warmup_steps": 1},
}
STEPS = 400


class WarmUp(TrainingExperiment, name="E5"):
    """The loss of the last steps of short runs, with a warm-up as long as the run and without it."""

    title = "Necessity of warm-up"
    question = "Which placements learn at a high learning rate without warm-up, and does warm-up rescue Post-LN?"
    source = "Xiong et al. 2020 (arXiv 2002.04745), figures 2 and 4"
    minutes = 17.0

    def tasks(self) -> Sequence[Task]:
        cells, seeds = (CELLS[:1], 1) if self.settings.quick else (CELLS, 5)
        runs = [("post", WITHOUT), ("post", WITH)] + [(name, WITHOUT) for name in ("pre", "residual", "deepnorm")]
        if not self.settings.quick:
            runs += [("post", DECAY)]
        return [
            {"residual": name, "num_layers": layers, "lr": lr, "steps": STEPS, "seed": seed, **SCHEDULES[schedule]}
            for seed in range(seeds)
            for layers, lr in cells
            for name, schedule in runs
        ]

    def measure(self, task: Task) -> Measurement:
        return self.record(self.train(task))

    def conclude(self, results: Sequence[Result]) -> Findings:
        cells = [cell for cell in CELLS if _of(results, cell)]
        return Findings(
            criteria=[criterion for cell in CELLS for criterion in _criteria(cell, results)],
            tables=[_table(cells, results)],
            pictures=[_picture(cell, results) for cell in cells],
            remarks=[
                f"Stuck is a mean loss of the last 25 steps of {STUCK} nats or more: 3.3 is what the frequencies of "
                "characters are worth.",
                "Without warm-up, the rate is that of the inverse-sqrt schedule with a warm-up of 400 steps whose ramp "
                "is left out, lr · √(400 / max(step, 400)), which is constant for 400 steps. The schedule that decays "
                "from the first step, lr / √step, is another: it soon leaves the rates at which Post-LN is stuck.",
                "What is stuck also depends on the embeddings: with ones of N(0, 1/64) that the head shares, DeepNorm "
                "was stuck as well at 6 layers and lr 0.003 (3.32, one seed).",
            ],
        )


def _of(results: Sequence[Result], cell: tuple[int, float], **where: object) -> list[Result]:
    return select(results, {"num_layers": cell[0], "lr": cell[1], **where})


def _losses(results: Sequence[Result], cell: tuple[int, float], name: str, schedule: str) -> list[float]:
    return [run.measured["last_loss"] for run in _of(results, cell, residual=name, **SCHEDULES[schedule])]


def _criteria(cell: tuple[int, float], results: Sequence[Result]) -> list[Criterion]:
    place = f"at {cell[0]} layers, lr {cell[1]:g}"
    without, with_ = (_losses(results, cell, "post", schedule) for schedule in (WITHOUT, WITH))
    others = {name: _losses(results, cell, name, WITHOUT) for name in ("pre", "residual", "deepnorm")}
    worst = {name: max(losses) for name, losses in others.items() if losses}
    loss, tolerance = EXPECTED[cell]
    return [
        Criterion(
            f"Post-LN without warm-up is stuck {place}: {STUCK} or more, with every seed",
            f"least {min(without):.3f} of {len(without)}" if without else "not measured",
            min(without) >= STUCK if without else None,
        ),
        Criterion(
            f"Post-LN with 400 steps of warm-up learns {place}: below {STUCK} with every seed",
            f"largest {max(with_):.3f} of {len(with_)}" if with_ else "not measured",
            max(with_) < STUCK if with_ else None,
        ),
        expected(
            f"it then reaches {loss} ± {tolerance} on average {place}",
            with_,
            at_least=loss - tolerance,
            at_most=loss + tolerance,
        ),
        Criterion(
            f"Pre-LN, ResiDual and DeepNorm without warm-up are never stuck {place}",
            ", ".join(f"{name} {most:.3f} at most" for name, most in worst.items()) or "not measured",
            max(worst.values()) < STUCK if len(worst) == len(others) else None,
        ),
    ]


def _runs(results: Sequence[Result], cell: tuple[int, float]) -> list[tuple[str, str]]:
    """The placements and schedules that were measured in this cell, in their order."""
    names = list(dict.fromkeys(run.task["residual"] for run in results))
    return [(name, schedule) for name in names for schedule in SCHEDULES if _losses(results, cell, name, schedule)]


def _table(cells: Sequence[tuple[int, float]], results: Sequence[Result]) -> Table:
    rows = []
    for cell in cells:
        for name, schedule in _runs(results, cell):
            losses = _losses(results, cell, name, schedule)
            stuck = sum(loss >= STUCK for loss in losses)
            rows.append((cell[0], cell[1], name, schedule, str(mean_interval(losses)), f"{stuck} of {len(losses)}"))
    columns = ["layers", "lr", "placement", "warm-up", "loss of the last 25 steps (95 %)", "seeds stuck"]
    return Table("Loss at the end of training", columns, rows)


def _picture(cell: tuple[int, float], results: Sequence[Result]) -> Picture:
    def lines() -> list[Curve]:
        return [
            loss_curve(
                f"{name}, {schedule}",
                [r.measured["losses"] for r in _of(results, cell, residual=name, **SCHEDULES[schedule])],
            )
            for name, schedule in _runs(results, cell)
        ]

    title = f"Training loss at {cell[0]} layers, lr {cell[1]:g}"
    return Picture(
        title,
        lambda: curves(lines(), x_label="step", y_label="loss (nats a character)", title=title),
        "Means of 25 steps over seeds, with their 95 % intervals.",
    )
