"""Comparisons and growth as 80-column tables, as JSON, and as plots."""

from __future__ import annotations

import math
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitransformer.benchmark.case import BenchSetting
from minitransformer.benchmark.limits import Limits
from minitransformer.benchmark.rounds import AGAIN, CaseResult, RoundsPlan
from minitransformer.benchmark.scaling import Growth
from minitransformer.benchmark.statistics import Ratio, interval_text, least_rounds
from minitransformer.processes import processors
from minitransformer.reporting.plain import titled_table
from minitransformer.reporting.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 80
FORMAT = 2


def case_table(result: CaseResult, limits: Limits | None) -> Iterator[str]:
    """The lines of a case: contestants, verdict, and absent contestants."""
    rows = []
    for name in result.samples:
        spread, share = result.spread(name), _share(result, name, limits)
        values = f"{number(spread.median)} [{number(spread.low)}–{number(spread.high)}]"
        ratio = "base" if name == result.base else interval_text(result.ratio(name))
        rows.append([name, values, ratio, None if share is None else f"{share:.0%}"])
    columns = ["contestant", "median [quartiles]", "times as good", "of limit"]
    title = f"{result.case.title}, {result.case.unit}"
    yield ""
    yield from (titled_table(Table(title, columns, rows), WIDTH) or title).splitlines()
    for line in _remarks(result, limits):
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="  ")


def _share(result: CaseResult, name: str, limits: Limits | None) -> float | None:
    cost = result.costs.get(name)
    return None if limits is None or cost is None else limits.share(cost, result.spread(name).median)


def _remarks(result: CaseResult, limits: Limits | None) -> Iterator[str]:
    verdict = result.verdict()
    if verdict is not None:
        yield f"{verdict}"
    if result.late:
        counts = sorted(len(result.ratios(name)) if name != result.base else 0 for name in result.samples)
        counts = [count for count in counts if count] or [len(values) for values in result.samples.values()]
        if counts:
            rounds = "1 round" if counts[-1] == 1 else f"{counts[-1]} rounds"
            few = f"{counts[0]} to {rounds}" if counts[0] < counts[-1] else rounds
            yield f"{few}: the time limit of this case was reached (--minutes)"
    if any((_share(result, name, limits) or 0) > 1 for name in result.samples):
        yield "above 100 % of the limit: the machine was slower while the limit was measured, so it is not usable"
    reasons: dict[str, list[str]] = {}
    for entry in result.absent:
        reasons.setdefault(entry.why, []).append(entry.name)
    for why, names in reasons.items():
        yield f"not measured: {', '.join(names)} ({why})"


def heading(setting: BenchSetting, plan: RoundsPlan, limits: Limits | None, why_no_limits: str = "") -> Iterator[str]:
    """What was measured, on which machine, and how to read the table."""
    about = machine()
    yield f"machine    {about['processor']}, {about['processors']} processors"[:WIDTH]
    yield f"           torch {about['torch']}, Python {about['python']}, {setting.device}"
    if limits is None:
        yield from textwrap.wrap(f"limits     not measured: {why_no_limits}", WIDTH, subsequent_indent=" " * 11)
    else:
        products = ", ".join(f"{name} {number(flops)}FLOP/s" for name, flops in limits.flops.items())
        yield f"limits     matrix products {products}; memory {number(limits.bytes)}B/s"
    yield f"shape      {setting.shape}"
    yield f"rounds     up to {plan.rounds}, of the base and each other in turn, after {plan.warmup} for warm-up"
    yield "           ratios are paired by rounds, [95 % interval of their median];"
    yield "           (again): the base measured twice, what differs by chance"
    if plan.rounds < least_rounds():
        yield f"           fewer than {least_rounds()} rounds give no intervals, and no winner"


def as_json(
    results: Sequence[CaseResult], setting: BenchSetting, plan: RoundsPlan, limits: Limits | None, why_no_limits: str
) -> dict[str, Any]:
    """All results, including every sample."""
    return {
        "format": FORMAT,
        "machine": machine(),
        "setting": {**asdict(setting), "against": str(setting.against.path) if setting.against else None},
        "plan": _finite(asdict(plan)),
        "limits": why_no_limits if limits is None else asdict(limits),
        "cases": [_case_as_json(result, limits) for result in results],
    }


def _case_as_json(result: CaseResult, limits: Limits | None) -> dict[str, Any]:
    verdict = result.verdict()
    contestants = {}
    for name, samples in result.samples.items():
        cost = result.costs.get(name)
        contestants[name] = {
            "samples": samples,
            "base_in_the_same_rounds": result.beside.get(name, samples),
            "spread": asdict(result.spread(name)),
            "ratio": _finite(asdict(result.ratio(name))),
            "cost": None if cost is None else asdict(cost),
            "share_of_limit": _share(result, name, limits),
        }
    return {
        "title": result.case.title,
        "unit": result.case.unit,
        "lower_is_better": result.case.lower_is_better,
        "base": result.base,
        "late": result.late,
        "noise_floor": result.floor if result.samples else None,
        "contestants": contestants,
        "winner": verdict.best if verdict is not None and verdict.winner else None,
        "verdict": None if verdict is None else str(verdict),
        "not_measured": {entry.name: entry.why for entry in result.absent},
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinite values, which JSON lacks, by null."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def picture(results: Sequence[CaseResult]) -> Figure:
    """A forest plot of the ratios of all cases; raises `UserError` without matplotlib."""
    from minitransformer.reporting.figures import intervals

    rows: list[tuple[str, Ratio, list[float]]] = []
    for result in results:
        for name in result.samples:
            if name != result.base:
                short = name.replace(AGAIN, ", again")
                label = f"{result.case.title}: {short} / {result.base}"
                rows.append((label, result.ratio(name), result.ratios(name)))
    known = [math.isfinite(ratio.high) for _, ratio, _ in rows]
    ends = [(r.low, r.high) if sure else (min(row), max(row)) for (_, r, row), sure in zip(rows, known, strict=True)]
    few = f"\ndotted: from the lowest to the highest of fewer than {least_rounds()} rounds" * (not all(known))
    return intervals(
        [label for label, _, _ in rows],
        [ratio.median for _, ratio, _ in rows],
        [low for low, _ in ends],
        [high for _, high in ends],
        dotted=[not sure for sure in known],
        x_label=f"times as good as the base (median{', 95 % interval' * any(known)}){few}",
        title="Benchmark",
        reference=1.0,
        log_x=True,
    )


def machine() -> dict[str, Any]:
    """The machine and versions of the measurement."""
    return {
        "processor": _processor(),
        "processors": processors(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "numpy", "transformers", "tokenizers", "tiktoken")},
        "command": sys.argv,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def number(value: float) -> str:
    """Three digits with an SI prefix."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{_three_digits(value / power)}{prefix}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(decimals, 4)}f}"


def growth_table(growths: Sequence[Growth]) -> Iterator[str]:
    """The lines of a table for each axis: its quantities, their ends, and the exponent between them."""
    columns = ["quantity", "from – to", "grows from – to", "exponent", "at last"]
    for growth in growths:
        rows = []
        for name, points in growth.points.items():
            if points:
                (first, low), (last, high) = points[0], points[-1]
                values = f"{number(low)} – {number(high)} {growth.units[name]}"
                exponents = [found and str(found) for found in (growth.exponent(name), growth.last_exponent(name))]
                rows.append([name, f"{number(first)} – {number(last)}", values, *exponents])
        title = f"{growth.axis.name}, {growth.axis.size_unit}"
        yield from (titled_table(Table(title, columns, rows), WIDTH) or title).splitlines()
        yield from textwrap.wrap(f"ends: {growth.stopped}", WIDTH, subsequent_indent="  ")
        yield ""
    yield "exponent p of value ∝ size^p: 1 is linear, 2 quadratic, 0 flat; ± standard error"
    yield "at last: between the two largest sizes, where constant terms matter least"


def growth_as_json(growths: Sequence[Growth]) -> dict[str, Any]:
    """All measurements."""
    return {"machine": machine(), "axes": {growth.axis.name: _as_json(growth) for growth in growths}}


def _as_json(growth: Growth) -> dict[str, Any]:
    quantities = {}
    for name, points in growth.points.items():
        exponent, last = growth.exponent(name), growth.last_exponent(name)
        known = exponent is not None and not math.isnan(exponent.error)
        quantities[name] = {
            "unit": growth.units[name],
            "sizes": [size for size, _ in points],
            "values": [value for _, value in points],
            "exponent": None if exponent is None else exponent.value,
            "standard_error": exponent.error if exponent is not None and known else None,
            "last_exponent": None if last is None else last.value,
        }
    return {"size_unit": growth.axis.size_unit, "stopped": growth.stopped, "quantities": quantities}


def growth_picture(growths: Sequence[Growth]) -> Figure:
    """Every quantity relative to its first value, over sizes relative to the first; `UserError` without matplotlib."""
    from minitransformer.reporting.figures import Curve, curves

    drawn = []
    for growth in growths:
        for name, points in growth.points.items():
            if len(points) > 1 and points[0][1] > 0:
                x = [size / points[0][0] for size, _ in points]
                drawn.append(Curve(f"{growth.axis.name}: {name}", x, [value / points[0][1] for _, value in points]))
    return curves(
        drawn,
        x_label="size / smallest size",
        y_label="value / value at the smallest size",
        title="Growth of memory and time",
        log_x=True,
        log_y=True,
    )
