"""Scaling results as an 80-column table, as JSON and as a plot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minitransformer.benchmark.report import WIDTH, machine, number
from minitransformer.benchmark.scaling import Growth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME, SIZES, VALUES, EXPONENT = 20, 17, 20, 15


def growth_table(growths: Sequence[Growth]) -> Iterator[str]:
    """The lines of the table: quantities by axis, their ends, and the exponent between them."""
    yield f"{'':{NAME}}{'from – to':{SIZES}}{'grows from – to':{VALUES}}{'exponent':{EXPONENT}}at last"
    for growth in growths:
        yield f"{growth.axis.name}, {growth.axis.size_unit}"
        yield "-" * WIDTH
        for name, points in growth.points.items():
            if points:
                yield _row(growth, name)
        yield from textwrap.wrap(f"ends: {growth.stopped}", WIDTH, subsequent_indent="  ")
        yield ""
    yield "exponent p of value ∝ size^p: 1 is linear, 2 quadratic, 0 flat; ± standard error"
    yield "at last: between the two largest sizes, where constant terms matter least"


def _row(growth: Growth, name: str) -> str:
    points = growth.points[name]
    (first, low), (last, high) = points[0], points[-1]
    sizes = f"{number(first)} – {number(last)}"
    values = f"{number(low)} – {number(high)} {growth.units[name]}"
    overall, at_last = (
        "" if found is None else str(found) for found in (growth.exponent(name), growth.last_exponent(name))
    )
    return f"  {name:{NAME - 2}}{sizes:{SIZES}}{values:{VALUES}}{overall:{EXPONENT}}{at_last}".rstrip()


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
