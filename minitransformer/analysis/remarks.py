"""Remarks on the runs of a comparison, besides their settings."""

from __future__ import annotations

from collections.abc import Sequence

from minitransformer.analysis.groups import RunGroup, distinct, varied_settings
from minitransformer.analysis.history import METRICS, History


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
