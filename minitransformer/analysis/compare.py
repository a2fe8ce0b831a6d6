"""Runs beside each other: what differs in their settings, how they learned, and what the seeds bear out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from minitransformer import files
from minitransformer.analysis.verdicts import (
    check_smallest_difference,
    choice_text,
    is_number,
    last_value,
    measure_of,
    pairs_table,
    series,
)
from minitransformer.errors import StorageError, UserError
from minitransformer.files import sha256
from minitransformer.records import read_bytes, read_json
from minitransformer.registry import lookup
from minitransformer.reporting import figures
from minitransformer.reporting.figures import Curve
from minitransformer.reporting.pages import Link, Page
from minitransformer.reporting.statistics import FEWEST_SEEDS, Interval, Ranking, decimals_of, mean_interval, ranking
from minitransformer.reporting.tables import Picture, Table
from minitransformer.settings import flattened, names_with
from minitransformer.training.config import RunConfig, TrainingConfig, as_of_today
from minitransformer.training.logging import parse_record

T = TypeVar("T")

CONFIG, METRICS = "config.json", "metrics.jsonl"
PARTS = "model", "data", "training"
TOKENIZERS = "tokenizer.json", "target-tokenizer.json"
Abscissa = Literal["step", "tokens", "seconds"]
X_LABELS: dict[Abscissa, str] = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
LONGEST_LABEL = 24
LOSSES = "training and validation loss (nats per target)"


@dataclass(frozen=True)
class History:
    """A run folder's settings, and the numbers that were written down while it trained.

    It is read as files, without the model's code: so runs of other versions, which have other settings, open too.
    """

    path: Path
    config: dict[str, Any]
    """what `config.json` holds"""
    records: tuple[dict[str, Any], ...]
    damaged: int
    """lines that are no record, as after a crash: they are left out"""

    @classmethod
    def open(cls, path: Path) -> History:
        """The run in the folder `path`; raises `UserError` if it is none, or has no metrics."""
        config = _config(path)
        file = path / METRICS
        text = read_bytes(file, "leave the run out").decode(errors="replace") if file.is_file() else ""
        parsed = [parse_record(line) for line in text.split("\n") if line.strip()]
        records = tuple(record for record in parsed if record is not None)
        if not records:
            raise UserError(f"{path} has no numbers in {METRICS}: train it for some steps, or leave it out")
        return cls(path, config, records, len(parsed) - len(records))

    @property
    def seed(self) -> int:
        return int(self.config["training"]["seed"])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What it learned by, but the seed, and which text, by name."""
        parts = as_of_today(self.config, str(self.path / CONFIG))
        values = {name: value for part in PARTS for name, value in flattened(RunConfig, parts[part]).items()}
        values["text"], values["parent"] = self.config.get("text", ""), _parent(self.config.get("parent"))
        silent = names_with(RunConfig, "observes_only")
        # None is what a version has that does not know the setting.
        return {name: value for name, value in values.items() if name not in silent and value is not None}

    @cached_property
    def tokenizers(self) -> tuple[str, ...]:
        """SHA-256 of its vocabularies' files: equal for those that encode alike."""
        return tuple(sha256(self.path / name) for name in TOKENIZERS if (self.path / name).is_file())

    @cached_property
    def metrics(self) -> set[str]:
        """The names of its numbers."""
        return {name for record in self.records for name, value in record.items() if is_number(value)}

    def series(self, metric: str) -> dict[int, float]:
        """`metric` by step; what was not finite is NaN."""
        return series(self.records, metric)

    def last(self, metric: str) -> float | None:
        """The last value; None if there is none."""
        return last_value(self.records, metric)

    def lowest(self, metric: str) -> float | None:
        """The lowest finite value; None if there is none."""
        return min((value for value in self.series(metric).values() if math.isfinite(value)), default=None)

    @property
    def steps(self) -> int:
        return max(record["step"] for record in self.records)

    def abscissa(self, steps: Sequence[int], by: Abscissa) -> np.ndarray:
        """Where `steps` lie on the axis `by`; between two records of tokens or seconds, in proportion."""
        if by == "step":
            return np.asarray(steps, dtype=float)
        known = {0: 0.0, **self.series(by)}
        return np.interp(steps, list(known), list(known.values()))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only, in the order of the seeds."""

    label: str
    histories: tuple[History, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return self.histories[0].settings

    @property
    def seeds(self) -> list[int]:
        return [history.seed for history in self.histories]

    def interval(self, value: Callable[[History], float | None]) -> Interval | None:
        """The mean of `value` over the seeds; None where one of them has none."""
        values = [value(history) for history in self.histories]
        known = [value for value in values if value is not None]
        return mean_interval(known) if len(known) == len(values) else None

    def curve(self, metric: str, by: Abscissa) -> Curve | None:
        """The mean of `metric` with its 95 % band, at the steps that all of the seeds have; None if there are none."""
        series = [history.series(metric) for history in self.histories]
        steps = sorted(set.intersection(*(set(one) for one in series)))
        if not steps:
            return None
        x = np.mean([history.abscissa(steps, by) for history in self.histories], axis=0)
        bands = [mean_interval([one[step] for one in series]) for step in steps]
        mean, low, high = ([getattr(band, end) for band in bands] for end in ("mean", "low", "high"))
        return Curve(self.label, x.tolist(), mean, *((low, high) if len(series) > 1 else (None, None)))


@dataclass(frozen=True)
class Comparability:
    """Which metrics of the groups mean the same, and what is to be said of it."""

    metric: str
    """what to compare them by, unless the user names another"""
    remark: str | None = None
    comparable: Callable[[str], bool] = lambda metric: True


def comparability(groups: Sequence[Group]) -> Comparability:
    """Losses are comparable for the same task on the same tokens; otherwise, bits per byte of the same text are."""
    known = set().union(*(history.metrics for group in groups for history in group.histories))
    best = "bits_per_byte" if "bits_per_byte" in known else "validation_loss" if "validation_loss" in known else "loss"
    of_task = sorted(names_with(TrainingConfig, "changes_task"))
    if len(_distinct(tuple(_setting(group, name) for name in of_task) for group in groups)) > 1:
        tasks = ", ".join(_distinct(str(_setting(group, "objective")) for group in groups))
        return Comparability(
            best, f"The runs learn different tasks ({tasks}): none of their losses are comparable.", _no
        )
    if len(_distinct(_setting(group, "text") for group in groups)) == 1:
        return Comparability("validation_loss" if "validation_loss" in known else "loss")
    if (
        len(_distinct(_sources(group) for group in groups)) == 1
        and len(_distinct(group.histories[0].tokenizers for group in groups)) > 1
    ):
        remark = (
            "The runs have different tokenizers: losses and rates per token are not comparable; bits per byte are, "
            "if the data did not change in between."
        )
        return Comparability(best, remark, lambda metric: measure_of(metric).across_tokenizers)
    remark = (
        "The runs learn different data: their losses are not comparable, and bits per byte say how well each predicts "
        "a text of its own."
    )
    return Comparability(best, remark, _no)


@dataclass(frozen=True)
class RunComparison:
    """Groups of runs, the metric that they are compared by, and what is to be said of it."""

    groups: tuple[Group, ...]
    metric: str
    by: Abscissa
    ranking: Ranking | None
    verdict: str
    remarks: tuple[str, ...]
    losses_comparable: bool

    def differences(self) -> Table:
        """The settings that differ."""
        names = {name: "hash of the text" if name == "text" else name for name in _varied(self.groups)}
        rows = [[said, *(_shown(_setting(group, name)) for group in self.groups)] for name, said in names.items()]
        return Table("What differs", ["setting", *(group.label for group in self.groups)], rows)

    def results(self) -> Table:
        """What came out: means over the seeds, with half of the 95 % interval."""
        rows = []
        for name, value in self._results.items():
            cells = [_mean_text(group.interval(value)) for group in self.groups]
            if any(cell is not None for cell in cells):
                rows.append([name, *cells])
        seeds = [_seeds_text(group.seeds) for group in self.groups]
        return Table("Results", ["", *(group.label for group in self.groups)], [["seeds", *seeds], *rows])

    def pairs(self) -> Table | None:
        """The paired differences; None where nothing was paired."""
        if self.ranking is None or not self.ranking.comparisons:
            return None
        return pairs_table(self.ranking, measure_of(self.metric).label)

    def runs(self) -> Table:
        """One row for each run: where it lies, its group, what differs, and its own results."""
        varied = _varied(self.groups)
        columns = ["run", "group", "seed", *varied, *self._results]
        rows = [
            [
                str(history.path),
                group.label,
                history.seed,
                *(_shown(_setting(group, name)) for name in varied),
                *(value(history) for value in self._results.values()),
            ]
            for group in self.groups
            for history in group.histories
        ]
        return Table("Runs", columns, rows)

    def curves(self, metric: str) -> list[Curve]:
        """Of the groups that have `metric`."""
        drawn = [group.curve(metric, self.by) for group in self.groups]
        return [curve for curve in drawn if curve is not None]

    def shown_curves(self) -> tuple[list[Curve], str]:
        """What to draw first, and what it measures: of a single group, training and validation loss together."""
        if len(self.groups) == 1 and self.metric == "validation_loss" and self.curves("loss"):
            names = {"loss": "training", "validation_loss": "validation"}
            return [replace(c, label=label) for name, label in names.items() for c in self.curves(name)], LOSSES
        return self.curves(self.metric), measure_of(self.metric).label

    def pictures(self) -> list[Picture]:
        """The curves, and the paired differences where there are some."""
        bands = " Bands: 95 % intervals of the mean over seeds." if any(len(g.seeds) > 1 for g in self.groups) else ""
        shown, wanted = [self.shown_curves()], self.losses_comparable and self.metric != "loss"
        if wanted and shown[0][1] != LOSSES:
            shown.append((self.curves("loss"), measure_of("loss").label))
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
            x_label=f"difference of {measure_of(self.metric).label}",
            title=title,
            reference=0,
        )
        return Picture(title, draw, "Differences of last values, seed by seed, with 95 % intervals.")

    @property
    def _results(self) -> dict[str, Callable[[History], float | None]]:
        """What is told of a run, by name; None where the run does not know it."""
        told: dict[str, Callable[[History], float | None]] = {
            "steps": lambda history: history.steps,
            "best validation loss": lambda history: history.lowest("validation_loss"),
            "last validation loss": lambda history: history.last("validation_loss"),
            "last training loss": lambda history: history.last("loss"),
            "bits per byte": lambda history: history.last("bits_per_byte"),
            "accuracy": lambda history: history.last("accuracy"),
            "exact": lambda history: history.last("exact"),
            "tokens per second": _rate,
            "minutes": _minutes,
        }
        if self.metric not in ("validation_loss", "loss", "bits_per_byte", "accuracy", "exact", "tokens_per_second"):
            told[f"last {measure_of(self.metric).label}"] = lambda history: history.last(self.metric)
        return told


def compare(
    paths: Sequence[Path],
    *,
    by: Abscissa = "step",
    metric: str | None = None,
    smallest_difference: float | None = None,
) -> RunComparison:
    """The runs in `paths` beside each other, by `metric` (None: validation loss, or bits per byte where losses are not
    comparable); no winner is named below `smallest_difference` (None: that of the metric).

    Raises `UserError` for folders that are no runs or have no metrics, for a metric that no run has, for a negative
    `smallest_difference`, and without scipy.
    """
    check_smallest_difference(smallest_difference)
    if not paths:
        raise UserError("there is nothing to compare: name two run folders or more, such as runs/*")
    opened = [History.open(path) for path in paths]
    histories, repeated = _without_repetitions(opened)
    groups = _groups(histories)
    judged = comparability(groups)
    chosen = judged.metric if metric is None else _known(metric, histories)
    remarks = [judged.remark, *repeated, *map(_damage, opened), *map(_unfinished, histories)]
    remarks += [_code(groups), _arithmetic(groups), _partly_validated(histories)]
    least = measure_of(chosen).smallest_difference if smallest_difference is None else smallest_difference
    ranked, verdict = _ranked(groups, chosen, judged.comparable(chosen), least)
    said = tuple(remark for remark in remarks if remark is not None)
    return RunComparison(tuple(groups), chosen, by, ranked, verdict, said, judged.comparable("validation_loss"))


def page(comparison: RunComparison, command: str, folder: Path, csv: Path | None = None) -> str:
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
    result.heading("How to repeat it")
    result.code(command)
    return result.html()


def _link(path: Path, folder: Path) -> Link:
    """To `path`, from a page in `folder`."""
    return Link(str(path), Path(os.path.relpath(path, folder)).as_posix())


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} is not a run folder (it has no {CONFIG}): give a folder that training has made")
    try:
        config: dict[str, Any] = files.unsealed(read_json(file, "restore it, or leave the run out"))
    except ValueError as error:
        raise StorageError(f"{file} is not what training wrote ({error}): restore it, or leave the run out") from None
    whole = all(isinstance(config.get(part), dict) for part in PARTS)
    if not whole or not isinstance(config["training"].get("seed"), int):
        raise UserError(f"{file} is no configuration with {', '.join(PARTS)} and a seed: leave the run out")
    return config


def _parent(record: Any) -> str | None:
    """Whose weights a run began with: a name, and of which content; None from scratch."""
    if not isinstance(record, dict):
        return None
    folder, checkpoint, digest = (str(record.get(name, "")) for name in ("path", "checkpoint", "sha256"))
    return f"{Path(folder).name} {checkpoint} ({digest[:8]})"


def _no(metric: str) -> bool:
    return False


def _distinct(values: Iterable[T]) -> list[T]:
    distinct: list[T] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return distinct


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _without_repetitions(histories: Sequence[History]) -> tuple[list[History], list[str]]:
    """The histories, each settings and seed once, and what is to be said of the others: they add no seed."""
    first: dict[tuple[str, int], History] = {}
    remarks = []
    for history in histories:
        kept = first.setdefault((_key(history.settings), history.seed), history)
        if kept is not history:
            remarks.append(f"{history.path} is left out: it has the settings and the seed of {kept.path}.")
    return list(first.values()), remarks


def _groups(histories: Sequence[History]) -> list[Group]:
    """Those that differ in seed only together, in the order of the first of each."""
    members: dict[str, list[History]] = {}
    for history in histories:
        members.setdefault(_key(history.settings), []).append(history)
    unnamed = [Group("", tuple(sorted(group, key=lambda history: history.seed))) for group in members.values()]
    return [replace(group, label=label) for group, label in zip(unnamed, _labels(unnamed), strict=True)]


def _labels(groups: Sequence[Group]) -> list[str]:
    """By what differs, if that is short; or else by what the names of the folders share; or else by letters."""
    derived = {"text", *names_with(RunConfig, "follows_data")}
    varied = [name for name in _varied(groups) if name not in derived]
    by_setting = [", ".join(choice_text(name, _shown(_setting(group, name))) for name in varied) for group in groups]
    by_folder = [_shared_name([history.path.name for history in group.histories]) for group in groups]
    for labels in (by_setting, by_folder):
        if len(set(labels)) == len(groups) and all(0 < len(label) <= LONGEST_LABEL for label in labels):
            return labels
    return [f"group {i}" for i in range(1, len(groups) + 1)]


def _shared_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("-_. ")


def _varied(groups: Sequence[Group]) -> list[str]:
    """The settings that are not the same in all groups."""
    names = _distinct(name for group in groups for name in group.settings)
    return [name for name in names if len({_key({"": _setting(group, name)}) for group in groups}) > 1]


def _shown(value: Any) -> Any:
    return value if value is None or isinstance(value, str | bool) or is_number(value) else str(value)


def _sources(group: Group) -> str:
    """What the text is made from, whatever the tokenizer."""
    data = group.histories[0].config["data"]
    return _key({name: value for name, value in data.items() if name not in ("tokenizer", "separate_vocabularies")})


def _setting(group: Group, name: str) -> Any:
    """None where the group's version does not know the setting."""
    return group.settings.get(name)


def _known(metric: str, histories: Sequence[History]) -> str:
    names = sorted(set().union(*(history.metrics for history in histories)) - {"step"})
    lookup("metric", metric, dict.fromkeys(names))
    return metric


def _damage(history: History) -> str | None:
    lines = "1 damaged line" if history.damaged == 1 else f"{history.damaged} damaged lines"
    return f"{history.path / METRICS}: {lines} left out." if history.damaged else None


def _unfinished(history: History) -> str | None:
    steps = history.config["training"].get("steps")
    unfinished = isinstance(steps, int) and history.steps < steps
    return f"{history.path} has done {history.steps} of its {steps} steps." if unfinished else None


def _partly_validated(histories: Sequence[History]) -> str | None:
    """What to say if validations of a run have read a part of their split, but not the last one."""
    read = [set(history.series("validation_tokens").values()) for history in histories]
    if all(len(tokens) < 2 for tokens in read):
        return None
    return "The last validation has read its whole split, those before it (and so perhaps the best) a part."


def _code(groups: Sequence[Group]) -> str | None:
    """What to say if the runs were made by different code, which no setting shows."""
    origins = [history.config.get("provenance") for group in groups for history in group.histories]
    commits = _distinct(str(origin["commit"]) for origin in origins if isinstance(origin, dict) and "commit" in origin)
    return f"The runs were made by different versions of the code: {', '.join(commits)}." if len(commits) > 1 else None


def _arithmetic(groups: Sequence[Group]) -> str | None:
    """What to say if "auto" came to different precisions, which no setting shows."""
    machines = [history.config.get("machine") for group in groups for history in group.histories]
    found = sorted({str(machine.get("precision")) for machine in machines if isinstance(machine, dict)})
    if len(found) < 2 or "precision" in _varied(groups):
        return None
    return f"The runs were computed in different precisions on different machines: {', '.join(found)}."


def _ranked(groups: Sequence[Group], metric: str, comparable: bool, smallest: float) -> tuple[Ranking | None, str]:
    """The groups by last values of `metric`, over the seeds that all of them have, and what that says in words."""
    measure = measure_of(metric)
    having = [group for group in groups if all(metric in history.metrics for history in group.histories)]
    if len(groups) < 2:
        return None, "One group of runs: there is nothing to compare it with."
    if not comparable:
        return None, f"No winner: these runs cannot be compared by {measure.label}."
    if len(having) < len(groups):
        missing = ", ".join(group.label for group in groups if group not in having)
        return None, f"No winner: {missing} has no {measure.label}."
    seeds = sorted(set.intersection(*(set(group.seeds) for group in groups)))
    if len(seeds) < 2:
        shared = f"only seed {seeds[0]}" if seeds else "no seed"
        return None, f"No winner: the groups share {shared}, and a winner needs {FEWEST_SEEDS}."
    last = {
        group.label: [history.last(metric) for history in group.histories if history.seed in seeds] for group in groups
    }
    values = {label: np.array(row, dtype=float) for label, row in last.items()}
    result = ranking(values, lower_is_better=measure.lower_is_better is not False, smallest=smallest)
    if measure.lower_is_better is None:
        return replace(result, winner=None), f"No winner: whether more or less {measure.label} is better is not known."
    return result, f"Compared by the last {measure.label} of seeds {_seeds_text(seeds)}. {result}"


def _rate(history: History) -> float | None:
    tokens, seconds = history.last("tokens"), history.last("seconds")
    return tokens / seconds if tokens and seconds else None


def _minutes(history: History) -> float | None:
    seconds = history.last("seconds")
    return None if seconds is None else seconds / 60


def _mean_text(interval: Interval | None) -> str | float | None:
    """A mean as a number; with half of its interval, where several seeds differ."""
    if interval is None:
        return None
    reach = interval.high - interval.mean
    if not math.isfinite(reach) or reach <= 0:
        return int(interval.mean) if interval.mean.is_integer() else interval.mean
    decimals = decimals_of(reach)
    return f"{interval.mean:.{decimals}f} ± {reach:.{decimals}f}"


def _seeds_text(seeds: Sequence[int]) -> str:
    """Such as 0, 3, 7; four or more in a row as 0–9."""
    in_a_row = len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}–{seeds[-1]}" if in_a_row else ", ".join(map(str, seeds))
