"""Publication-quality figures: curves with bands, heatmaps, forest plots.

Curves differ in colour (the colour-blind-safe palette of Okabe and Ito), line style and
marker, so that they are distinguishable in greyscale too. Legends are outside the axes and never cover data.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from minitransformer.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color, without yellow, which is too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "osD^vPX*"
MOST_BELOW = 4
"""maximum number of curves with the legend below the axes; otherwise it is at the right"""
MARKS = 9
"""markers on a curve of many points"""
MOST_PLAIN = 100
"""maximum ratio of the ends of a logarithmic axis with plain-number ticks"""
LABELS_TO_RIGHT = 0.8
"""fraction of the x-axis up to which the names of points are at their right, where they stay inside the axes"""
LETTERS_PER_INCH = 11
"""of titles"""
DPI = 150
INK, FAINT = "#1b1b1f", "#8a8d94"


@dataclass(frozen=True)
class Curve:
    """A mean over x with an optional band; non-finite values are gaps."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def curves(
    curves: Sequence[Curve], *, x_label: str, y_label: str, title: str, log_x: bool = False, log_y: bool = False
) -> Figure:
    """The curves with their bands on one pair of axes; raises `UserError` without matplotlib."""
    at_right = len(curves) > MOST_BELOW
    height = max(4.0, 1.0 + 0.24 * len(curves)) if at_right else 4.2
    figure = _figure(7.6 if at_right else 6.4, height)
    axes = _axes(figure, title=title, x_label=x_label, y_label=y_label)
    axes.grid(color="#e3e5e9", linewidth=0.6)
    lines = [_draw(axes, curve, i) for i, curve in enumerate(curves)]
    if log_x:
        _log_x(axes, curves)
    elif all(float(x).is_integer() for curve in curves for x in curve.x):
        axes.locator_params(axis="x", integer=True)  # there is no layer 2.5
    if log_y:
        _log_y(axes)
    if len(curves) > 1:
        _legend(figure, axes, lines, [curve.label for curve in curves], at_right=at_right)
    return figure


def heatmap(
    values: ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    value_label: str,
    format_spec: str = ".3g",
) -> Figure:
    """A heatmap of `values` (rows × columns), with the number in each cell; raises `UserError` without matplotlib.

    Non-finite cells are blank, with a dash.
    """
    table = np.asarray(values, dtype=float)
    assert table.shape == (len(rows), len(columns)), "a label for each row and each column"
    longest = max(len(str(label)) for label in rows)
    figure = _figure(min(14.0, 2.0 + 0.09 * longest + 0.62 * len(columns)), min(14.0, 1.6 + 0.36 * len(rows)))
    axes = _axes(figure, title=title, x_label="", y_label="")
    image = axes.imshow(np.ma.masked_invalid(table), aspect="auto", cmap="cividis")
    axes.set_xticks(range(len(columns)), columns, **_slant(columns))
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _write_cells(axes, image, table, format_spec)
    bar = figure.colorbar(image, ax=axes, label=value_label, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=FAINT)
    return figure


def _write_cells(axes: Axes, image: Any, table: np.ndarray, format_spec: str) -> None:
    """Write the number of each cell in a readable colour; a dash if it is not finite."""
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        ink = _ink_on(tuple(np.ravel(image.cmap(image.norm(value))))) if np.isfinite(value) else FAINT
        text = format(value, format_spec).replace("-", "−") if np.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7.5)


def intervals(
    labels: Sequence[str],
    means: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    x_label: str,
    title: str,
    reference: float | None = None,
    log_x: bool = False,
    dotted: Sequence[bool] = (),
) -> Figure:
    """A forest plot: means with intervals; raises `UserError` without matplotlib.

    `reference` is a vertical line, and markers are hollow if the interval covers it. An interval with non-finite
    ends is a marker without bars. `dotted` ones are ranges rather than confidence intervals: their
    lines are dotted, and their markers hollow.
    """
    longest = max(map(len, labels), default=0)
    figure = _figure(max(6.4, 3.6 + 0.08 * longest), 1.4 + 0.32 * len(labels))
    axes = _axes(figure, title=title, x_label=x_label, y_label="")
    axes.grid(axis="x", color="#e3e5e9", linewidth=0.6)
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=1.0, linestyle=(0, (4, 2)))
        axes.set_xlabel(f"{x_label}\n(hollow: the interval covers {reference:g}{', or there is none' * any(dotted)})")
    ranges = dotted or [False] * len(means)
    for y, (mean, low, high, is_range) in enumerate(zip(means, lows, highs, ranges, strict=True)):
        excluded = not is_range and reference is not None and (reference < low or reference > high)
        hollow = reference is not None and not (excluded and np.isfinite([low, high]).all())
        _draw_interval(axes, y, mean, low, high, style=":" if is_range else "-", hollow=hollow)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    if log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, *axes.get_xlim())
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _draw_interval(axes: Axes, y: int, mean: float, low: float, high: float, *, style: str, hollow: bool) -> None:
    """A marker at the mean, and bars to the ends if they are finite."""
    if np.isfinite([low, high]).all():
        axes.plot([low, high], [y, y], color=PALETTE[0], linestyle=style, linewidth=1.8, solid_capstyle="butt")
        axes.plot([low, high], [y, y], color=PALETTE[0], linestyle="none", marker="|", markersize=8)
    face = "white" if hollow else PALETTE[0]
    axes.plot([mean], [y], marker="o", markersize=6, color=PALETTE[0], markerfacecolor=face, markeredgewidth=1.4)


def points(
    x: Sequence[float] | Sequence[str],
    y: Sequence[float],
    marked: Sequence[bool],
    *,
    x_label: str,
    y_label: str,
    title: str,
    mark: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """A scatter plot over numbers or categories; `marked` points are filled, with `mark` as their legend. Non-finite
    values are omitted. Raises `UserError` without matplotlib."""
    figure = _figure(6.4, 4.2)
    axes = _axes(figure, title=title, x_label=x_label, y_label=y_label)
    axes.grid(color="#e3e5e9", linewidth=0.6)
    names = list(dict.fromkeys(name for name in x if isinstance(name, str)))
    places = np.asarray([names.index(at) if isinstance(at, str) else at for at in x], dtype=float)
    values, filled = np.asarray(y, dtype=float), np.asarray(marked, dtype=bool)
    for chosen, face, text in ((~filled, "none", "others"), (filled, PALETTE[1], mark)):
        shown = chosen & np.isfinite(values)
        edge = PALETTE[1] if text == mark else PALETTE[0]
        marker = "D" if text == mark else "o"
        axes.scatter(places[shown], values[shown], s=36, facecolors=face, edgecolors=edge, marker=marker, label=text)
    if names:
        axes.set_xticks(range(len(names)), names, **_slant(names))
        axes.set_xlim(-0.5, len(names) - 0.5)
    distinct = sorted(set(places.tolist()))
    if log_x:
        _log_x(axes, [Curve("", distinct, [])])
    elif not names and len(distinct) <= 8:
        axes.set_xticks(distinct, [f"{at:g}" for at in distinct])
    if log_y:
        _log_y(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


@dataclass(frozen=True)
class Point:
    """A named point of a curve, with the ends of its interval, if it has one."""

    curve: str
    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    origin: tuple[float, float] | None = None
    """where a second point of the same thing comes from; it is filled, and no part of the line of its curve"""


def named_points(points: Sequence[Point], *, x_label: str, y_label: str, title: str, line: str, filled: str) -> Figure:
    """Curves of named points with vertical intervals, and a horizontal `line`, so called, through the first point.

    Points with an origin are filled, which the legend says in the words `filled`. Raises `UserError` without
    matplotlib.
    """
    curves = list(dict.fromkeys(point.curve for point in points))
    figure = _figure(8.4, max(4.6, 1.2 + 0.24 * len(curves)))
    axes = _axes(figure, title=title, x_label=x_label, y_label=y_label)
    axes.grid(color="#e3e5e9", linewidth=0.6)
    axes.margins(x=0.1, y=0.08)
    places = [point.x for point in points]
    edge = min(places) + LABELS_TO_RIGHT * (max(places) - min(places))
    lines = [axes.axhline(points[0].y, color=FAINT, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)]
    for number, curve in enumerate(curves):
        own = [point for point in points if point.curve == curve]
        color = INK if number == 0 else PALETTE[(number - 1) % (len(PALETTE) - 1)]
        style: dict[str, Any] = {
            "color": color,
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 6,
            "linewidth": 1.0,
        }
        plain = sorted((point.x, point.y) for point in own if point.origin is None)
        x, y = zip(*plain, strict=True) if plain else ((), ())
        lines += axes.plot(x, y, markerfacecolor="white", zorder=3, **style)
        for point in own:
            _draw_point(axes, point, style, to_left=point.x > edge)
    if any(point.origin for point in points):
        curves.append(filled)
        lines += axes.plot([], [], marker="o", linestyle=":", color=FAINT)
    _legend(figure, axes, lines, [line, *curves], at_right=True)
    return figure


def _draw_point(axes: Axes, point: Point, style: dict[str, Any], *, to_left: bool) -> None:
    """The interval of `point`, and its name beside it, or, if it has an origin, itself and a line from there."""
    if point.low is not None and point.high is not None:
        axes.plot([point.x] * 2, [point.low, point.high], color=style["color"], linewidth=1.4, zorder=2)
    if point.origin is None:
        beside: dict[str, Any] = {"xytext": (-5, 4), "ha": "right"} if to_left else {"xytext": (5, 4)}
        axes.annotate(point.name, (point.x, point.y), textcoords="offset points", fontsize=7, color=INK, **beside)
        return
    axes.plot(*zip(point.origin, (point.x, point.y), strict=True), linestyle=":", color=style["color"], linewidth=1.0)
    axes.plot([point.x], [point.y], zorder=4, **style)


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def check_figures() -> None:
    """Raises `UserError` without matplotlib."""
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise UserError('figures need matplotlib, which is not installed: pip install -e ".[lab]"') from None


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, without a window or global state."""
    check_figures()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes(figure: Figure, *, title: str, x_label: str, y_label: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    width = int(LETTERS_PER_INCH * (figure.get_figwidth() - 1.0))
    axes.set_title(textwrap.fill(title, width), fontsize=11, loc="left", pad=10)
    axes.set_xlabel(x_label, fontsize=10)
    axes.set_ylabel(y_label, fontsize=10)
    axes.tick_params(labelsize=9, color=FAINT)
    for side, spine in axes.spines.items():
        spine.set_color(FAINT)
        spine.set_visible(side in ("left", "bottom"))
    return axes


def _draw(axes: Axes, curve: Curve, index: int) -> Line2D:
    """Draw the curve in the style of its index."""
    x, mean = np.asarray(curve.x, dtype=float), np.asarray(curve.mean, dtype=float)
    color = PALETTE[index % len(PALETTE)]
    spacing = max(1, -(-len(x) // MARKS))
    (line,) = axes.plot(
        x,
        np.where(np.isfinite(mean), mean, np.nan),
        color=color,
        linestyle=LINE_STYLES[index % len(LINE_STYLES)],
        linewidth=1.6,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4.5,
        # Shifted from curve to curve, so that markers of coinciding curves do not overlap.
        markevery=((index * 2) % spacing, spacing),
    )
    if curve.low is not None and curve.high is not None:
        low, high = np.asarray(curve.low, dtype=float), np.asarray(curve.high, dtype=float)
        axes.fill_between(x, low, high, where=np.isfinite(low) & np.isfinite(high), color=color, alpha=0.2, linewidth=0)
    return line


def _log_x(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic x axis, with ticks at the curves' points if these are few."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    points = sorted({float(x) for curve in curves for x in curve.x})
    if 2 <= len(points) <= 8:
        axes.set_xticks(points, [f"{point:g}" for point in points])
        axes.xaxis.set_minor_locator(NullLocator())


def _log_y(axes: Axes) -> None:
    """A logarithmic y axis."""
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis, *axes.get_ylim())


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain-number ticks on a logarithmic axis of few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if high / low < MOST_PLAIN:
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7) if high / low < 5 else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=steps, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, lines: Sequence[Line2D], labels: Sequence[str], *, at_right: bool) -> None:
    # Matplotlib leaves out labels that begin with an underscore.
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 3.2}
    if at_right:
        axes.legend(lines, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **style)
    else:
        columns = len(labels) if sum(len(label) + 10 for label in labels) <= 84 else 1
        figure.legend(lines, labels, loc="outside lower center", ncols=columns, **style)


def _slant(labels: Sequence[str]) -> dict[str, Any]:
    """Style of column labels: slanted if they would overlap."""
    if max(len(str(label)) for label in labels) <= 7:
        return {}
    return {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}


def _ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever is more readable on `color` (red, green, blue in 0…1; ITU-R BT.709 luminance)."""
    luminance = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]
    return INK if luminance > 0.5 else "white"
