"""The report of a sweep: `report.html`, `trials.csv`, and a PNG file for each swept setting."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.analysis.search_space import label, value_text
from minitransformer.analysis.sweep import Standing, SweepFolder, standings_ranking
from minitransformer.analysis.sweep_plan import SweepPlan, flags
from minitransformer.analysis.verdicts import pairs_table
from minitransformer.evaluation.metrics import Metric
from minitransformer.reporting import figures
from minitransformer.reporting.pages import Link, Page
from minitransformer.reporting.report import (
    MOST_FAILURES,
    REPORT,
    add_facts,
    add_picture,
    add_table,
    csv_text,
    failed,
    skipped,
)
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.store import REMEDY
from minitransformer.tasks.task import Failure, task_key
from minitransformer.training.presets import PRESETS

TRIALS_CSV = "trials.csv"
BEST = "best_validation_loss", "best_step"
WIDE = 10.0
"""ratio of the ends from which an axis is logarithmic"""


def standings_table(sweep: SweepFolder) -> Table:
    """Each combination at the last rung that it reached, furthest first, then the best first."""
    plan = sweep.plan
    names = [setting.name for setting in plan.settings]
    halved = plan.halving is not None
    columns = [*names, *(["steps"] * halved), plan.judge.title + " [95 %]" * (len(plan.seeds) > 1)]
    rows = [
        [
            *(_cell(standing.combination[name]) for name in names),
            *([standing.until] * halved),
            standing.mean if len(plan.seeds) == 1 and math.isfinite(standing.mean) else outcome_text(standing),
        ]
        for standing in sweep.all_standings()
    ]
    return Table("Combinations", columns, rows)


def _cell(value: Any) -> Any:
    return value_text(value) if isinstance(value, float) or value is None else value


def outcome_text(standing: Standing) -> str:
    """The mean over seeds with its interval, or why there is none."""
    if standing.interval is not None:
        return str(standing.interval)
    parts = [
        f"{what} ({_seeds(seeds)})"
        for what, seeds in (("not finite", standing.diverged), ("not measured", standing.missing))
        if seeds
    ]
    return ", ".join(parts)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def diverged(standings: Sequence[Standing]) -> str | None:
    """A sentence on the combinations that diverged; None if none did."""
    found = [f"{label(standing.combination)} ({_seeds(standing.diverged)})" for standing in standings]
    found = [text for text, standing in zip(found, standings, strict=True) if standing.diverged]
    if not found:
        return None
    more = f" and {len(found) - MOST_FAILURES} more" if len(found) > MOST_FAILURES else ""
    return f"Infinite or NaN losses, which rank last: {'; '.join(found[:MOST_FAILURES])}{more}."


@dataclass(frozen=True)
class Conclusion:
    """The conclusion about the best, at the last rung with several combinations."""

    text: str
    pairs: Table | None = None
    """comparison of the best with every other; None without pairs"""


def conclusion(sweep: SweepFolder) -> Conclusion:
    """The conclusion at the last rung with several combinations."""
    plan = sweep.plan
    for number in range(len(plan.rungs), 0, -1):
        standings = sweep.standings(number)
        if len(standings) > 1:
            least = plan.judge.smallest_difference if plan.smallest_difference is None else plan.smallest_difference
            ranked = standings_ranking(standings, lower_is_better=plan.sign > 0, smallest=least)
            when = f"At {standings[0].until} steps: " if plan.halving is not None else ""
            what = f"the last {plan.judge.title}" + (f" at {standings[0].until} steps" if when else "")
            pairs = pairs_table(ranked, what, of=ranked.order[0]) if ranked.comparisons else None
            return Conclusion(f"{when}{ranked}", pairs)
    return Conclusion("There is nothing to compare.")


def best_seed(plan: SweepPlan, standing: Standing) -> int:
    """The seed with the best result."""
    return min((plan.sign * value, seed) for value, seed in zip(standing.values, plan.seeds, strict=True))[1]


def train_command(plan: SweepPlan, standing: Standing) -> str:
    """The command that trains the best trial of a combination from scratch."""
    config = plan.config(standing.combination, best_seed(plan, standing))
    return shlex.join(["python", "train.py", plan.preset, *flags(PRESETS[plan.preset], config)])


def trials_table(sweep: SweepFolder) -> Table:
    """A row for each trial and rung."""
    names = [setting.name for setting in sweep.plan.settings]
    results = sweep.results()
    metrics = [name for name in Metric.registry if any(name in result.measured for result in results)]
    columns = [*names, "seed", "steps", *metrics, *BEST, "finite", "run", "seconds"]
    rows = [
        [
            *(result.task[name] for name in names),
            result.task["seed"],
            result.measured["steps"],
            *(result.measured.get(name) for name in (*metrics, *BEST)),
            result.measured["finite"],
            result.measured["run"],
            sweep.store.seconds[task_key(result.task)],
        ]
        for result in results
    ]
    return Table("Trials", columns, rows)


def extreme(plan: SweepPlan) -> str:
    """What the best metric is."""
    return "lowest" if plan.sign > 0 else "highest"


def pictures(sweep: SweepFolder) -> list[Picture]:
    """The metric against each swept setting, at the first rung."""
    plan, standings = sweep.plan, sweep.standings(1)
    finite = [standing for standing in standings if any(map(math.isfinite, standing.values))]
    if not finite:
        return []
    steps = f" after {finite[0].until} steps" if len({standing.until for standing in finite}) == 1 else ""
    return [_picture(plan, name, finite, steps) for name in plan.varied]


def _picture(plan: SweepPlan, name: str, standings: Sequence[Standing], steps: str) -> Picture:
    caption = f"Each point is a trial; those of the {extreme(plan)} mean are filled."
    if len(plan.varied) > 1:
        caption += " Trials with the same value differ in other settings."
    points = [(standing, value) for standing in standings for value in standing.values if math.isfinite(value)]
    x = [standing.combination[name] for standing, _ in points]
    y = [value for _, value in points]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in x)
    return Picture(
        f"{plan.judge.title.capitalize()}{steps} by {name}",
        lambda: figures.points(
            x if numeric else [value_text(value) for value in x],  # type: ignore[arg-type]
            y,
            [standing is standings[0] for standing, _ in points],
            x_label=name,
            y_label=plan.judge.title,
            title=f"{plan.preset}{steps}",
            mark=f"{extreme(plan)} mean",
            log_x=numeric and _is_wide(x),  # type: ignore[arg-type]
            log_y=_is_wide(y),
        ),
        caption,
    )


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= WIDE


def write_sweep_report(sweep: SweepFolder, said: Conclusion, failures: Sequence[Failure], command: str) -> Path:
    """Write the report to the folder of `sweep`, with the conclusion `said`; returns the path of the page.

    Raises `UserError` if the folder is not writable, and without matplotlib.
    """
    folder = sweep.folder
    with files.writing(folder / REPORT, REMEDY):
        trials = trials_table(sweep)
        files.write_text(folder / TRIALS_CSV, csv_text(trials))
        page = Page(f"Sweep of {sweep.plan.preset}: {', '.join(setting.name for setting in sweep.plan.settings)}")
        _plan(page, sweep.plan)
        _standings(page, sweep, said)
        for picture in pictures(sweep):
            add_picture(page, picture, folder / f"by-{picture.title.rpartition(' ')[2]}.png")
        add_table(page, _linked(trials), TRIALS_CSV)
        _repeat(page, sweep, failures, command)
        files.write_text(folder / REPORT, page.html())
    return folder / REPORT


def _linked(table: Table) -> Table:
    """The table of trials with links to their folders."""
    run = table.columns.index("run")
    rows = [[*row[:run], Link(row[run], f"{row[run]}/"), *row[run + 1 :]] for row in table.rows]
    return Table(table.title, table.columns, rows)


def _plan(page: Page, plan: SweepPlan) -> None:
    sought = "Minimised" if plan.sign > 0 else "Maximised"
    page.paragraph(f"{method(plan)} {sought}: the final {plan.judge.title} of a trial, as in `compare`.")
    page.table(["setting", "values"], [(setting.name, str(setting)) for setting in plan.settings])


def method(plan: SweepPlan) -> str:
    """How the combinations are chosen and trained, in a sentence or two."""
    count, seeds = len(plan.combinations), _seeds(plan.seeds)
    how = f"{count} combinations" if plan.random is None else f"{count} random combinations (draw {plan.draw_seed})"
    text = f"{how}, each with {seeds}."
    if plan.halving is None:
        return text
    *pauses, last = plan.rungs
    after = " and ".join(filter(None, [", ".join(map(str, pauses[:-1])), str(pauses[-1])]))
    return f"{text} After {after} steps, the best 1/{plan.halving} continue from their checkpoints, until {last}."


def _standings(page: Page, sweep: SweepFolder, said: Conclusion) -> None:
    add_table(page, standings_table(sweep))
    best = sweep.standings(len(sweep.plan.rungs))[0]
    page.paragraph(f"{extreme(sweep.plan).capitalize()}: {label(best.combination)}, {outcome_text(best)}. {said.text}")
    if (sentence := diverged(sweep.all_standings())) is not None:
        page.paragraph(sentence)
    if math.isfinite(best.mean):
        page.paragraph("To reproduce its best trial (bit for bit on a CPU with OMP_NUM_THREADS=1, as here):")
        page.code(train_command(sweep.plan, best))
    if said.pairs is not None:
        add_table(page, said.pairs)


def _repeat(page: Page, sweep: SweepFolder, failures: Sequence[Failure], command: str) -> None:
    page.heading("How to reproduce this")
    page.code(command)
    if sweep.store.skipped:
        page.paragraph(skipped(sweep.store.skipped))
    for sentence in failed(failures, "Trials"):
        page.paragraph(sentence)
    add_facts(page, sweep.records[-1] if sweep.records else {})
