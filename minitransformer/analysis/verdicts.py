"""The figures that runs are compared by, and their paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from minitransformer.errors import UserError
from minitransformer.reporting.statistics import Ranking, p_text
from minitransformer.reporting.tables import Table

Record = Mapping[str, Any]
"""A line of metrics.jsonl: a step and its metrics."""


def choice_text(name: str, value: object) -> str:
    """A setting and its value in words; `--residual` is called placement, since one of its values is `residual`."""
    return f"{'placement' if name == 'residual' else name} {value}"


def check_smallest_difference(value: float | None) -> None:
    """Raises `UserError` if `value` is negative or NaN."""
    if value is not None and not 0 <= value < math.inf:
        raise UserError(f"--smallest-difference is {value:g}: give 0 (any significant winner) or more")


def is_number(value: Any) -> bool:
    """Whether `value` is a number; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def series(records: Iterable[Record], metric: str) -> dict[int, float]:
    """`metric` by step; NaN where it is not finite, and empty if it is never a number."""
    found = {record["step"]: record[metric] for record in records if metric in record}
    if not any(map(is_number, found.values())):
        return {}
    return {step: float(value) if is_number(value) else math.nan for step, value in sorted(found.items())}


def last_value(records: Iterable[Record], metric: str) -> float | None:
    """The value that a run is compared by: `metric` at the last step that has it; None if none has."""
    return next(reversed(series(records, metric).values()), None)


def pairs_table(ranking: Ranking, what: str, *, of: str | None = None) -> Table:
    """The paired differences of `what`, for all pairs or those with `of`; p-values are corrected for all pairs."""
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
