"""What a sweep leaves for its reader: `report.html`, `trials.csv`, and a PNG file for each setting that varied."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.analysis.sweep import (
    Plan,
    Search,
    Standing,
    best_seed,
    flags,
    label,
    standings_ranking,
    value_text,
)
from minitransformer.analysis.trials import minimised_metrics
from minitransformer.analysis.verdicts import pairs_table
from minitransformer.evaluation.metrics import Metric
from minitransformer.lab.report import MOST_FAILURES, MOST_ROWS, REPORT, rows_text, skipped
from minitransformer.lab.runner import Failure
from minitransformer.lab.store import REMEDY, task_key
from minitransformer.reporting import figures
from minitransformer.reporting.pages import Link, Page
from minitransformer.reporting.tables import Picture, Table
from minitransformer.training.presets import PRESETS

TRIALS_CSV = "trials.csv"
BEST = "best_validation_loss", "best_step"
WIDE = 10.0
"""ratio of the ends of an axis from which on it is logarithmic"""


def standings_table(search: Search) -> Table:
    """Each combination at the last rung that it came to: those that came furthest first, the lowest metric first."""
    plan = search.plan
    names = [setting.name for setting in plan.settings]
    halved = plan.halving is not None
    columns = [*names, *(["steps"] * halved), Metric.named(plan.metric).title + " [95 %]" * (len(plan.seeds) > 1)]
    rows = [
        [
            *(_cell(standing.combination[name]) for name in names),
            *([standing.until] * halved),
            standing.mean if len(plan.seeds) == 1 and math.isfinite(standing.mean) else outcome_text(standing),
        ]
        for standing in search.all_standings()
    ]
    return Table("Combinations", columns, rows)


def _cell(value: Any) -> Any:
    return value_text(value) if isinstance(value, float) or value is None else value


def outcome_text(standing: Standing) -> str:
    """The mean over the seeds with its interval, or why there is none."""
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
    """Which combinations were not finite, in a sentence; None if all were."""
    found = [f"{label(standing.combination)} ({_seeds(standing.diverged)})" for standing in standings]
    found = [text for text, standing in zip(found, standings, strict=True) if standing.diverged]
    if not found:
        return None
    more = f" and {len(found) - MOST_FAILURES} more" if len(found) > MOST_FAILURES else ""
    return f"Infinite or NaN losses, which rank last: {'; '.join(found[:MOST_FAILURES])}{more}."


@dataclass(frozen=True)
class Conclusion:
    """What the seeds say of the lowest, at the last rung where there was something to compare."""

    text: str
    pairs: Table | None = None
    """the lowest against every other; None where nothing is paired"""


def conclusion(search: Search) -> Conclusion:
    """Of the last rung with several combinations."""
    plan = search.plan
    for number in range(len(plan.rungs), 0, -1):
        standings = search.standings(number)
        if len(standings) > 1:
            ranked = standings_ranking(standings, plan.smallest_difference)
            when = f"At {standings[0].until} steps: " if plan.halving is not None else ""
            what = f"the last {Metric.named(plan.metric).title}" + (f" at {standings[0].until} steps" if when else "")
            pairs = pairs_table(ranked, what, of=ranked.order[0]) if ranked.comparisons else None
            return Conclusion(f"{when}{ranked}", pairs)
    return Conclusion("There was nothing to compare.")


def train_command(plan: Plan, standing: Standing) -> str:
    """What is typed to train the best trial of a combination again, from the start to the end."""
    config = plan.config(standing.combination, best_seed(standing, plan.seeds))
    return shlex.join(["python", "train.py", plan.preset, *flags(PRESETS[plan.preset], config)])


def trials_table(search: Search) -> Table:
    """A row for each trial and rung."""
    names = [setting.name for setting in search.plan.settings]
    columns = [*names, "seed", "steps", *minimised_metrics(), *BEST, "finite", "run", "seconds"]
    rows = [
        [
            *(result.task[name] for name in names),
            result.task["seed"],
            result.measured["steps"],
            *(result.measured.get(name) for name in (*minimised_metrics(), *BEST)),
            result.measured["finite"],
            result.measured["run"],
            search.store.seconds[task_key(result.task)],
        ]
        for result in search.results()
    ]
    return Table("Trials", columns, rows)


def pictures(search: Search) -> list[Picture]:
    """The metric against each setting that varied, after the first rung, which is the same for all."""
    plan, standings = search.plan, search.standings(1)
    finite = [standing for standing in standings if any(map(math.isfinite, standing.values))]
    if not finite:
        return []
    steps = f" after {finite[0].until} steps" if len({standing.until for standing in finite}) == 1 else ""
    return [_picture(plan, name, finite, steps) for name in plan.varied]


def _picture(plan: Plan, name: str, standings: Sequence[Standing], steps: str) -> Picture:
    caption = "A point is a trial; those of the lowest mean are filled."
    if len(plan.varied) > 1:
        caption += " Trials over one value differ in the other settings too."
    points = [(standing, value) for standing in standings for value in standing.values if math.isfinite(value)]
    x = [standing.combination[name] for standing, _ in points]
    y = [value for _, value in points]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in x)
    return Picture(
        f"{Metric.named(plan.metric).title.capitalize()}{steps} by {name}",
        lambda: figures.points(
            x if numeric else [value_text(value) for value in x],  # type: ignore[arg-type]
            y,
            [standing is standings[0] for standing, _ in points],
            x_label=name,
            y_label=Metric.named(plan.metric).title,
            title=f"{plan.preset}{steps}",
            mark="lowest mean",
            log_x=numeric and _is_wide(x),  # type: ignore[arg-type]
            log_y=_is_wide(y),
        ),
        caption,
    )


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= WIDE


def write_report(search: Search, said: Conclusion, failures: Sequence[Failure], command: str) -> Path:
    """Write the report into the folder of `search`, with its conclusion `said`, and return the path of its page.

    Raises `UserError` where the folder may not be written, and without matplotlib.
    """
    folder = search.folder
    with files.writing(folder / REPORT, REMEDY):
        trials = trials_table(search)
        _write_csv(folder / TRIALS_CSV, trials)
        page = Page(f"Sweep of {search.plan.preset}: {', '.join(setting.name for setting in search.plan.settings)}")
        _plan(page, search.plan)
        _standings(page, search, said)
        for picture in pictures(search):
            png = figures.png(picture.draw())
            with files.whole_file(folder / f"by-{picture.title.rpartition(' ')[2]}.png") as file:
                file.write(png)
            page.figure(png, f"{picture.title}. {picture.caption}", picture.title)
        _trials(page, trials)
        _repeat(page, search, failures, command)
        files.write_text(folder / REPORT, page.html())
    return folder / REPORT


def _trials(page: Page, table: Table) -> None:
    """The trials with a link to the folder of each."""
    run = table.columns.index("run")
    rows = [[*row[:run], Link(row[run], f"{row[run]}/"), *row[run + 1 :]] for row in table.rows[:MOST_ROWS]]
    page.heading(table.title)
    page.table(table.columns, rows)
    page.links(rows_text(table), [Link(TRIALS_CSV, TRIALS_CSV)])


def _write_csv(path: Path, table: Table) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in table.rows)
    files.write_text(path, text.getvalue())


def _plan(page: Page, plan: Plan) -> None:
    minimised = f"Minimised: {Metric.named(plan.metric).title}, a trial's last, by which `compare` judges too."
    page.paragraph(f"{method(plan)} {minimised}")
    page.table(["setting", "values"], [(setting.name, str(setting)) for setting in plan.settings])


def method(plan: Plan) -> str:
    """How the combinations are chosen and trained, in a sentence or two."""
    count, seeds = len(plan.combinations), _seeds(plan.seeds)
    how = f"{count} combinations" if plan.random is None else f"{count} random combinations (draw {plan.draw_seed})"
    text = f"{how}, each with {seeds}."
    if plan.halving is None:
        return text
    *pauses, last = plan.rungs
    after = " and ".join(filter(None, [", ".join(map(str, pauses[:-1])), str(pauses[-1])]))
    return f"{text} After {after} steps, the best one in {plan.halving} goes on from its checkpoint, until {last}."


def _standings(page: Page, search: Search, said: Conclusion) -> None:
    table = standings_table(search)
    page.heading(table.title)
    page.table(table.columns, table.rows[:MOST_ROWS])
    best = search.standings(len(search.plan.rungs))[0]
    page.paragraph(f"Lowest: {label(best.combination)}, {outcome_text(best)}. {said.text}")
    if (sentence := diverged(search.all_standings())) is not None:
        page.paragraph(sentence)
    if math.isfinite(best.mean):
        page.paragraph("To train its best trial again (with OMP_NUM_THREADS=1, as here, bit for bit on a CPU):")
        page.code(train_command(search.plan, best))
    if said.pairs is not None:
        page.heading(said.pairs.title)
        page.table(said.pairs.columns, said.pairs.rows[:MOST_ROWS])


def _repeat(page: Page, search: Search, failures: Sequence[Failure], command: str) -> None:
    page.heading("How to repeat it")
    page.code(command)
    if search.store.skipped:
        page.paragraph(skipped(search.store.skipped))
    if failures:
        page.paragraph(f"{len(failures)} trials failed; the same command tries them again:")
        for failure in failures[:MOST_FAILURES]:
            page.paragraph(str(failure))
    record = search.records[-1] if search.records else {}
    page.table(["what", "value"], [(name, value) for name, value in record.items() if value and name != "command"])
