"""Metrics of items with 95% intervals: of one model, of the difference between two, and of gaps between groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.evaluation.intervals import Bounds
from minitransformer.evaluation.items import Items, Totals, resampled_weights
from minitransformer.evaluation.metrics import Metric

SMALL = 30
"""a group of fewer items is small: its figures are shown, and it is left out of the largest gap"""
Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value, and its 95% interval; None where one item, or a constant, gives none."""

    value: float
    interval: Bounds | None

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


def defined_metrics(totals: Totals) -> dict[str, float]:
    """Every metric that is defined for these totals."""
    values = {name: metric.value(totals) for name, metric in Metric.registry.items() if metric.in_words}
    return {name: value for name, value in values.items() if value is not None}


def estimates_of(items: Items) -> dict[str, Estimate]:
    """Every metric that is defined for `items`.

    Its interval is the score interval if it is a share of the items, and the bootstrap percentile interval otherwise.
    """
    totals = items.totals()
    values, found = defined_metrics(totals), {}
    samples = resampled_metrics(items, list(values))
    for (name, value), drawn in zip(values.items(), samples, strict=True):
        known = Metric.named(name).interval(totals)
        found[name] = Estimate(value, known or _percentiles(drawn, len(items)))
    return found


def resampled_metrics(items: Items, names: Sequence[str], stream: int = 0) -> Samples:
    """[names, resamples] the metrics of items that are drawn again with replacement; NaN where undefined."""
    metrics = [Metric.named(name) for name in names]
    drawn = (items.totals(weights) for weights in resampled_weights(len(items), stream))
    return np.array([[metric.value(totals) for metric in metrics] for totals in drawn], np.float64).T


def _percentiles(drawn: Samples, count: int) -> Bounds | None:
    """The interval of a bootstrap; None for a constant, and for a single item."""
    if count < 2 or np.isnan(drawn).all():
        return None
    low, high = np.nanquantile(drawn, (0.025, 0.975)).tolist()
    return low, high


@dataclass(frozen=True)
class PairedDifference:
    """A metric of two models on the same items, and the first less the second with its interval."""

    first: float
    second: float
    difference: Estimate

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        bounds = self.difference.interval
        return bounds is not None and not bounds[0] <= 0 <= bounds[1]

    def to_json(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "difference": self.difference.to_json()}


def paired_differences(first: Items, second: Items) -> dict[str, PairedDifference]:
    """The differences of all metrics that are defined for both; items are drawn in pairs.

    Koehn 2004, "Statistical significance tests for machine translation evaluation", section 4.
    """
    assert len(first) == len(second), "the same items"
    ours, theirs = (defined_metrics(each.totals()) for each in (first, second))
    names = [name for name in ours if name in theirs]
    drawn = resampled_metrics(first, names) - resampled_metrics(second, names)
    return {
        name: PairedDifference(
            ours[name], theirs[name], Estimate(ours[name] - theirs[name], _percentiles(samples, len(first)))
        )
        for name, samples in zip(names, drawn, strict=True)
    }


@dataclass(frozen=True)
class Gap:
    """The largest difference of a metric between two groups, from the lowest value to the highest."""

    lowest: str
    highest: str
    gap: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "highest": self.highest, **self.gap.to_json()}


def largest_gaps(groups: Mapping[str, Items]) -> dict[str, Gap]:
    """The largest gap of each metric between groups that are not small, of which there are two or more.

    As the groups were chosen for their gap, its interval is that of all pairs at once: the value ± the 95% quantile of
    the largest error of any difference between resampled groups. Tukey 1953; Romano and Wolf 2005, "Exact and
    approximate stepdown methods for multiple hypothesis testing", section 4.
    """
    large = {name: items for name, items in groups.items() if len(items) >= SMALL}
    if len(large) < 2:
        return {}
    values = {name: defined_metrics(items.totals()) for name, items in large.items()}
    names = [name for name in next(iter(values.values())) if all(name in each for each in values.values())]
    drawn = np.stack(
        [resampled_metrics(items, names, stream) for stream, items in enumerate(large.values(), start=1)], axis=-1
    )
    return {name: _gap({group: of[name] for group, of in values.items()}, drawn[i]) for i, name in enumerate(names)}


def _gap(values: dict[str, float], drawn: Samples) -> Gap:
    """The gap between groups with these values, and resampled ones [resamples, groups]."""
    lowest, highest = min(values, key=values.__getitem__), max(reversed(values), key=values.__getitem__)
    gap, errors = values[highest] - values[lowest], drawn - np.array(list(values.values()))
    reach = float(np.nanquantile(np.ptp(errors, axis=1), 0.95))
    return Gap(lowest, highest, Estimate(gap, (max(0.0, gap - reach), gap + reach)))


def by_value(labels: Sequence[str], items: Items) -> Iterator[tuple[str, Items]]:
    """The items of each label, sorted by its name."""
    named = np.array(labels, dtype=object)
    for label in sorted(set(labels)):
        yield label, items[named == label]
