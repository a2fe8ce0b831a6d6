"""By what runs are judged, wherever they are put beside each other: the figure, and the paired differences of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from minitransformer.errors import UserError
from minitransformer.reporting.statistics import Ranking, p_text
from minitransformer.reporting.tables import Table

Record = Mapping[str, Any]
"""A line of metrics.jsonl: a step, and what was measured after it."""


def choice_text(name: str, value: object) -> str:
    """A setting and its value in words; what `--residual` chooses is a placement, as one of them is `residual`."""
    return f"{'placement' if name == 'residual' else name} {value}"


def check_smallest_difference(value: float | None) -> None:
    """Raises `UserError` for one that is negative or no number."""
    if value is not None and not 0 <= value < math.inf:
        raise UserError(f"--smallest-difference is {value:g}: give 0, which names any winner that is sure, or more")


def is_number(value: Any) -> bool:
    """Whether `value` is one; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def series(records: Iterable[Record], metric: str) -> dict[int, float]:
    """`metric` by step; what was not finite is NaN, and a metric that never is a number has no steps."""
    found = {record["step"]: record[metric] for record in records if metric in record}
    if not any(map(is_number, found.values())):
        return {}
    return {step: float(value) if is_number(value) else math.nan for step, value in sorted(found.items())}


def last_value(records: Iterable[Record], metric: str) -> float | None:
    """The figure that a run is judged by: `metric` at the last step that has it; None if none has."""
    return next(reversed(series(records, metric).values()), None)


def pairs_table(ranking: Ranking, what: str, *, of: str | None = None) -> Table:
    """The paired differences of `what`, of all pairs or those of one name alone; p-values are corrected for all."""
    rows = [
        [
            f"{pair.first} − {pair.second}",
            str(pair.difference) if math.isfinite(pair.difference.mean) else None,
            pair.difference.n,
            p_text(pair.p),
        ]
        for pair in ranking.comparisons
        if of is None or pair.first == of
    ]
    columns = ["pair", "difference [95 % interval]", "seeds", "p (Holm)"]
    return Table(f"Paired differences of {what}", columns, rows)
