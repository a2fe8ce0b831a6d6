"""Which metrics of groups of runs are comparable, which differences are significant, and remarks on the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minitransformer.analysis.groups import RunGroup, distinct, seeds_text, varied_settings
from minitransformer.analysis.history import METRICS, History
from minitransformer.analysis.known_settings import settings_of_task
from minitransformer.evaluation.metrics import metric_called
from minitransformer.reporting.statistics import FEWEST_SEEDS, Ranking, ranking


@dataclass(frozen=True)
class Comparability:
    """Which metrics of the groups are comparable, and remarks on that."""

    metric: str
    """default metric of the comparison"""
    remark: str | None = None
    comparable: Callable[[str], bool] = lambda metric: True


def comparability(groups: Sequence[RunGroup]) -> Comparability:
    """Losses are comparable for the same task on the same tokens; otherwise, bits per byte of the same text are."""
    known = set().union(*(history.metrics for group in groups for history in group.histories))
    best = "bits_per_byte" if "bits_per_byte" in known else "validation_loss" if "validation_loss" in known else "loss"
    if len(distinct(tuple(group.setting(name) for name in settings_of_task()) for group in groups)) > 1:
        tasks = ", ".join(distinct(str(group.setting("objective")) for group in groups))
        return Comparability(
            best, f"The runs have different training tasks ({tasks}): their losses are not comparable.", _no
        )
    if len(distinct(group.setting("text") for group in groups)) == 1:
        return Comparability("validation_loss" if "validation_loss" in known else "loss")
    if (
        len(distinct(group.sources for group in groups)) == 1
        and len(distinct(group.histories[0].tokenizers for group in groups)) > 1
    ):
        remark = (
            "The runs have different tokenizers: losses and rates per token are not comparable; bits per byte are, "
            "if the data did not change in between."
        )
        return Comparability(best, remark, lambda metric: metric_called(metric).across_tokenizers)
    remark = (
        "The runs have different data: their losses are not comparable, and bits per byte measure how well each "
        "predicts its own text."
    )
    return Comparability(best, remark, _no)


def _no(metric: str) -> bool:
    return False


def rank_groups(
    groups: Sequence[RunGroup], metric: str, comparable: bool, smallest: float
) -> tuple[Ranking | None, str]:
    """A ranking of the groups by final `metric` over common seeds, with a summary in words."""
    measure = metric_called(metric)
    having = [group for group in groups if all(metric in history.metrics for history in group.histories)]
    if len(groups) < 2:
        return None, "One group of runs: there is nothing to compare."
    if not comparable:
        return None, f"No winner: these runs cannot be compared by {measure.label}."
    if len(having) < len(groups):
        missing = ", ".join(group.label for group in groups if group not in having)
        return None, f"No winner: {missing} has no {measure.label}."
    seeds = sorted(set.intersection(*(set(group.seeds) for group in groups)))
    if len(seeds) < 2:
        shared = f"only seed {seeds[0]}" if seeds else "no seed"
        return None, f"No winner: the groups share {shared}, and naming a winner needs {FEWEST_SEEDS}."
    last = {
        group.label: [history.last(metric) for history in group.histories if history.seed in seeds] for group in groups
    }
    values = {label: np.array(row, dtype=float) for label, row in last.items()}
    result = ranking(values, lower_is_better=measure.lower_is_better is not False, smallest=smallest)
    if measure.lower_is_better is None:
        return replace(
            result, winner=None
        ), f"No winner: it is unknown whether higher or lower {measure.label} is better."
    return result, f"Compared by the final {measure.label} of seeds {seeds_text(seeds)}. {result}"


def remarks_on(groups: Sequence[RunGroup], opened: Sequence[History]) -> list[str]:
    """Remarks on the `groups`, and on all runs that were `opened` for them."""
    histories = [history for group in groups for history in group.histories]
    found = [*map(_damage, opened), *map(_unfinished, histories)]
    found += [_code(histories), _precisions(groups), _partly_validated(histories)]
    return [remark for remark in found if remark is not None]


def _damage(history: History) -> str | None:
    lines = "1 damaged line" if history.damaged == 1 else f"{history.damaged} damaged lines"
    return f"{history.path / METRICS}: {lines} left out." if history.damaged else None


def _unfinished(history: History) -> str | None:
    steps = history.config["training"].get("steps")
    unfinished = isinstance(steps, int) and history.steps < steps
    return f"{history.path} is unfinished: {history.steps} of {steps} steps." if unfinished else None


def _partly_validated(histories: Sequence[History]) -> str | None:
    """A remark if validations except the last read a subset of their split."""
    read = [set(history.series("validation_tokens").values()) for history in histories]
    if all(len(tokens) < 2 for tokens in read):
        return None
    return "The last validation read the whole split, earlier ones (and so perhaps the best) a subset."


def _code(histories: Sequence[History]) -> str | None:
    """A remark if the runs were made by different versions of the code."""
    origins = [history.config.get("provenance") for history in histories]
    commits = distinct(str(origin["commit"]) for origin in origins if isinstance(origin, dict) and "commit" in origin)
    return f"The runs were made by different versions of the code: {', '.join(commits)}." if len(commits) > 1 else None


def _precisions(groups: Sequence[RunGroup]) -> str | None:
    """A remark if "auto" was resolved to different precisions."""
    machines = [history.config.get("machine") for group in groups for history in group.histories]
    found = sorted({str(machine.get("precision")) for machine in machines if isinstance(machine, dict)})
    if len(found) < 2 or "precision" in varied_settings(groups):
        return None
    return f"The runs were trained in different precisions on different machines: {', '.join(found)}."
