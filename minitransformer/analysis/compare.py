"""Compare runs: settings, training curves, and significance across seeds, as tables, pictures and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from minitransformer.analysis.comparability import comparability, rank_groups, remarks_on
from minitransformer.analysis.groups import (
    RunGroup,
    group_runs,
    seeds_text,
    setting_cell,
    varied_settings,
    without_repetitions,
)
from minitransformer.analysis.history import Abscissa, History
from minitransformer.analysis.verdicts import check_smallest_difference, pairs_table
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import metric_called
from minitransformer.registry import lookup
from minitransformer.reporting import figures
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.pages import Link, Page
from minitransformer.reporting.statistics import Interval, Ranking, decimals_of
from minitransformer.reporting.tables import Picture, Table

X_LABELS: dict[Abscissa, str] = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
LOSSES = "training and validation loss (nats per target)"


@dataclass(frozen=True)
class RunComparison:
    """Groups of runs, the metric that they are compared by, and remarks."""

    groups: tuple[RunGroup, ...]
    metric: str
    by: Abscissa
    ranking: Ranking | None
    verdict: str
    remarks: tuple[str, ...]
    losses_comparable: bool

    def differences(self) -> Table:
        """The settings that differ."""
        names = {name: "hash of the text" if name == "text" else name for name in varied_settings(self.groups)}
        rows = [[said, *(setting_cell(group.setting(name)) for group in self.groups)] for name, said in names.items()]
        return Table("What differs", ["setting", *(group.label for group in self.groups)], rows)

    def results(self) -> Table:
        """The results: means over seeds, ± half of the 95 % confidence interval."""
        rows = []
        for name, value in self._results.items():
            cells = [_mean_text(group.interval(value)) for group in self.groups]
            if any(cell is not None for cell in cells):
                rows.append([name, *cells])
        seeds = [seeds_text(group.seeds) for group in self.groups]
        return Table("Results", ["", *(group.label for group in self.groups)], [["seeds", *seeds], *rows])

    def pairs(self) -> Table | None:
        """The paired differences; None if there are none."""
        if self.ranking is None or not self.ranking.comparisons:
            return None
        return pairs_table(self.ranking, metric_called(self.metric).label)

    def runs(self) -> Table:
        """One row per run: its folder, group, differing settings and results."""
        varied = varied_settings(self.groups)
        columns = ["run", "group", "seed", *varied, *self._results]
        rows = [
            [
                str(history.path),
                group.label,
                history.seed,
                *(setting_cell(group.setting(name)) for name in varied),
                *(value(history) for value in self._results.values()),
            ]
            for group in self.groups
            for history in group.histories
        ]
        return Table("Runs", columns, rows)

    def curves(self, metric: str) -> list[Curve]:
        """The curves of the groups that have `metric`."""
        drawn = [group.curve(metric, self.by) for group in self.groups]
        return [curve for curve in drawn if curve is not None]

    def shown_curves(self) -> tuple[list[Curve], str]:
        """The main curves and their label; for a single group, training and validation loss together."""
        if len(self.groups) == 1 and self.metric == "validation_loss" and self.curves("loss"):
            names = {"loss": "training", "validation_loss": "validation"}
            return [replace(c, label=label) for name, label in names.items() for c in self.curves(name)], LOSSES
        return self.curves(self.metric), metric_called(self.metric).label

    def pictures(self) -> list[Picture]:
        """The curves, and the paired differences if there are any."""
        bands = " Bands: 95 % intervals of the mean over seeds." if any(len(g.seeds) > 1 for g in self.groups) else ""
        shown, wanted = [self.shown_curves()], self.losses_comparable and self.metric != "loss"
        if wanted and shown[0][1] != LOSSES:
            shown.append((self.curves("loss"), metric_called("loss").label))
        pictures = []
        for drawn, label in shown:
            if drawn:
                title = f"{label[0].upper()}{label[1:]}".partition(" (")[0]
                caption = f"{title} by {X_LABELS[self.by]}.{bands}"
                draw = partial(figures.curves, drawn, x_label=X_LABELS[self.by], y_label=label, title=title)
                pictures.append(Picture(title, draw, caption))
        if self.ranking is not None and self.ranking.comparisons:
            pictures.append(self._forest(self.ranking))
        return pictures

    def _forest(self, ranking: Ranking) -> Picture:
        pairs = ranking.comparisons
        title = "Paired differences"
        draw = partial(
            figures.intervals,
            [f"{pair.first} − {pair.second}" for pair in pairs],
            [pair.difference.mean for pair in pairs],
            [pair.difference.low for pair in pairs],
            [pair.difference.high for pair in pairs],
            x_label=f"difference in {metric_called(self.metric).label}",
            title=title,
            reference=0,
        )
        return Picture(title, draw, "Paired differences of final values per seed, with 95 % confidence intervals.")

    @property
    def _results(self) -> dict[str, Callable[[History], float | None]]:
        """The results of a run, by name; None for missing ones."""
        told: dict[str, Callable[[History], float | None]] = {
            "steps": lambda history: history.steps,
            "best validation loss": lambda history: history.lowest("validation_loss"),
            "last validation loss": lambda history: history.last("validation_loss"),
            "last training loss": lambda history: history.last("loss"),
            "bits per byte": lambda history: history.last("bits_per_byte"),
            "accuracy": lambda history: history.last("accuracy"),
            "exact match": lambda history: history.last("exact"),
            "tokens per second": _rate,
            "minutes": _minutes,
        }
        if self.metric not in ("validation_loss", "loss", "bits_per_byte", "accuracy", "exact", "tokens_per_second"):
            told[f"last {metric_called(self.metric).label}"] = lambda history: history.last(self.metric)
        return told


def compare(
    paths: Sequence[Path],
    *,
    by: Abscissa = "step",
    metric: str | None = None,
    smallest_difference: float | None = None,
) -> RunComparison:
    """Compare the runs in `paths` by `metric` (None: validation loss, or bits per byte if losses are not
    comparable); no winner is named below `smallest_difference` (None: that of the metric).

    Raises `UserError` for folders without a run or metrics, for a metric that no run has, for a negative
    `smallest_difference`, and without scipy.
    """
    check_smallest_difference(smallest_difference)
    if not paths:
        raise UserError("there is nothing to compare: give two or more run folders, such as runs/*")
    opened = [History.open(path) for path in paths]
    histories, repeated = without_repetitions(opened)
    groups = group_runs(histories)
    judged = comparability(groups)
    chosen = judged.metric if metric is None else known_metric(metric, histories)
    remarks = [*([judged.remark] if judged.remark else []), *repeated, *remarks_on(groups, opened)]
    least = metric_called(chosen).smallest_difference if smallest_difference is None else smallest_difference
    ranked, verdict = rank_groups(groups, chosen, judged.comparable(chosen), least)
    losses_comparable = judged.comparable("validation_loss")
    return RunComparison(tuple(groups), chosen, by, ranked, verdict, tuple(remarks), losses_comparable)


def known_metric(metric: str, histories: Sequence[History]) -> str:
    names = sorted(set().union(*(history.metrics for history in histories)) - {"step"})
    lookup("metric", metric, dict.fromkeys(names))
    return metric


def _rate(history: History) -> float | None:
    tokens, seconds = history.last("tokens"), history.last("seconds")
    return tokens / seconds if tokens and seconds else None


def _minutes(history: History) -> float | None:
    seconds = history.last("seconds")
    return None if seconds is None else seconds / 60


def _mean_text(interval: Interval | None) -> str | float | None:
    """A mean as a number, or with ± half of its interval if several seeds differ."""
    if interval is None:
        return None
    reach = interval.high - interval.mean
    if not math.isfinite(reach) or reach <= 0:
        return int(interval.mean) if interval.mean.is_integer() else interval.mean
    decimals = decimals_of(reach)
    return f"{interval.mean:.{decimals}f} ± {reach:.{decimals}f}"


def comparison_page(comparison: RunComparison, command: str, folder: Path, csv: Path | None = None) -> str:
    """The comparison as one self-contained HTML file in `folder`, with links to the runs and to `csv`; raises
    `UserError` without matplotlib."""
    names = [group.label for group in comparison.groups]
    result = Page("Comparison of " + (" and ".join(names) if len(names) < 3 else f"{len(names)} groups of runs"))
    result.paragraph(comparison.verdict)
    for remark in comparison.remarks:
        result.paragraph(remark)
    tables = [comparison.results(), comparison.differences(), comparison.pairs(), comparison.runs()]
    pictures = [(picture, figures.png(picture.draw())) for picture in comparison.pictures()]
    for picture, png in pictures[:1]:
        result.figure(png, picture.caption, picture.title)
    for table in tables[:3]:
        if table is not None and table.rows:
            result.heading(table.title)
            result.table(table.columns, table.rows)
    for picture, png in pictures[1:]:
        result.figure(png, picture.caption, picture.title)
    result.heading("Runs")
    runs = comparison.runs()
    result.table(runs.columns, [[_link(Path(path), folder), *row] for path, *row in runs.rows])
    if csv is not None:
        result.links("With all digits:", [_link(csv, folder)])
    result.heading("How to reproduce this")
    result.code(command)
    return result.html()


def _link(path: Path, folder: Path) -> Link:
    """To `path`, from a page in `folder`."""
    return Link(str(path), Path(os.path.relpath(path, folder)).as_posix())
