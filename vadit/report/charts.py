"""Charts drawn by matplotlib as SVG inside the page, in the page's own colours and letters.

A curve of any length becomes at most `MAX_POINTS` points: the mean of each of so many equal stretches of the log,
over a pale band from minimum to maximum, so that a single spike stays visible.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vadit.runtime.errors import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_POINTS = 150  # points of one curve: one for about two pixels of a small chart on the page
PALETTE = ("#2f6fde", "#e4572e", "#2a9d6f", "#8e5bd0", "#c98a04", "#0e9aa7", "#c2417c", "#5b6475")
"""Colours of runs, in their order; they go round. All but the grey can be read on white and on near-black."""
GREY = len(PALETTE) - 1

_PAPER, _RULE, _SOFT = "#ffffff", "#e3e7ee", PALETTE[GREY]
OF_PAGE = {_PAPER: "var(--paper)", _RULE: "var(--line)", _SOFT: "var(--soft)"}
"""Colours that the page sets, in its light and its dark."""
_SMALL, _WIDE = (320, 190), (760, 330)
"""Width and height of a chart in points, of which the page makes pixels."""
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "vadit", "text.parse_math": False}
"""Letters stay letters, ids are the same each time, and a $ in a run's name begins no formula."""
_LOG_RATIO = 20.0  # positive curves whose 95th percentile is so many times the 5th are drawn on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """A quantity over a run: x in images, y in its unit; values that are not finite are left out and counted."""

    x: np.ndarray
    y: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Which points are numbers, bool (n,)."""
        return np.isfinite(self.x) & np.isfinite(self.y)


@dataclass(frozen=True)
class Series:
    """One curve of a chart, or one set of marks."""

    name: str  # what the legend says
    curve: Curve
    color: int = 0  # index into PALETTE, which goes round
    style: Literal["line", "dashed", "dots", "rings"] = "line"
    """dashed: projected, not measured. dots, rings: points without a line; rings are published values."""
    labels: tuple[str, ...] = ()  # a word at each point of dots or rings

    @property
    def is_line(self) -> bool:
        return self.style in ("line", "dashed")

    @property
    def shade(self) -> str:
        return PALETTE[self.color % len(PALETTE)]


@dataclass(frozen=True)
class Chart:
    """Curves on one pair of axes."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "images"
    y_label: str = ""
    may_be_log: bool = True  # allows a logarithmic axis for positive values that span decades
    x_from_zero: bool = True  # whether the horizontal axis starts at zero
    x_log: bool = False  # a logarithmic horizontal axis, from the first value above zero
    level: float | None = None  # height of a dotted horizontal line
    wide: bool = False  # as wide as the page, with a legend of its own
    note: str = ""  # a sentence below it


def is_flat(curve: Curve) -> bool:
    """Whether a curve shows nothing: fewer than two finite values, or all within a percent."""
    y = curve.y[curve.finite]
    return len(y) < 2 or float(np.ptp(y)) <= 0.01 * float(np.abs(y).max())


def is_worth_drawing(chart: Chart) -> bool:
    """Whether any line of a chart, or its marks where it has no line, shows something."""
    lines = [series.curve for series in chart.series if series.is_line]
    return not all(map(is_flat, lines)) if lines else any(series.curve.finite.any() for series in chart.series)


def svg(chart: Chart) -> str:
    """A chart as an SVG element to be set into a page, or an empty string where no value is finite."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        figure = draw(chart, *(_WIDE if chart.wide else _SMALL))
        if figure is None:
            return ""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_page(buffer.getvalue(), f"{chart.title} over {chart.x_label}")


def draw(chart: Chart, width: int, height: int) -> Figure | None:
    """A figure of so many points; None where no value is finite."""
    from matplotlib.figure import Figure

    drawn = []
    for series in chart.series:
        keep = series.curve.finite & (series.curve.x > 0) if chart.x_log else series.curve.finite
        if keep.any():
            x, y = series.curve.x[keep].astype(np.float64), series.curve.y[keep].astype(np.float64)
            points = MAX_POINTS if series.is_line else len(x)
            drawn.append((series, reduce_curve(x, y, points, by_log=chart.x_log and series.is_line)))
    if not drawn:
        return None
    figure = Figure(figsize=(width / 72, height / 72))
    plot = figure.add_axes((52 / width, 34 / height, 1 - 66 / width, 1 - 46 / height))
    _set_axes(plot, chart, [reduced for _, reduced in drawn])
    for series, reduced in drawn:
        if series.is_line and series.curve.finite.sum() > MAX_POINTS:
            plot.fill_between(reduced.x, reduced.low, reduced.high, color=series.shade, alpha=0.15, linewidth=0)
    for series, reduced in drawn:
        plot.plot(
            reduced.x, reduced.mean, color=series.shade, linewidth=1.6,
            linestyle={"line": "solid", "dashed": "dashed"}.get(series.style, "none"),
            marker="o", markevery=[-1] if series.is_line else 1, markersize=4.5 if series.is_line else 7,
            markerfacecolor=_PAPER if series.style == "rings" else series.shade, zorder=3 - (series.style == "rings"),
        )  # fmt: skip
    if chart.level is not None:
        plot.axhline(chart.level, color=_SOFT, linestyle=(0, (1, 3)), linewidth=1.2)
    _label_points(plot, [series for series, _ in drawn])
    return figure


class Reduced(NamedTuple):
    """Means and extremes of consecutive points, each (m,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reduce_curve(x: np.ndarray, y: np.ndarray, points: int = MAX_POINTS, *, by_log: bool = False) -> Reduced:
    """At most `points` consecutive groups of a curve (n,), n >= 1: of nearly equal size, or as wide in log x > 0."""
    count = min(points, len(y))
    starts = np.linspace(0, len(y), count + 1).astype(int)[:-1]
    if by_log and count > 1 and x[-1] > x[0]:
        edges = np.geomspace(x[0], x[-1], count + 1)[:-1]
        starts = np.unique(np.searchsorted(x, edges * (1 - 1e-12)))
    sizes = np.diff(np.append(starts, len(y)))
    return Reduced(
        x=np.add.reduceat(x, starts) / sizes,
        mean=np.add.reduceat(y, starts) / sizes,
        low=np.minimum.reduceat(y, starts),
        high=np.maximum.reduceat(y, starts),
    )


def short_number(value: float, _: Any = None) -> str:
    """A number in few characters: 81.9M, 12k, 0.304, 1.5e-06; the second argument is matplotlib's, for ticks."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.2g}" if 0 < size < 1e-3 else f"{value:.4g}"


def _set_axes(plot: Axes, chart: Chart, drawn: Sequence[Reduced]) -> None:
    """Scales, limits and ticks, before anything is drawn."""
    lows, highs = zip(*(_extent(reduced) for reduced in drawn), strict=True)
    low, high = min(lows), max(highs)
    small, large = np.percentile(np.concatenate([reduced.mean for reduced in drawn]), [5, 95])
    if chart.may_be_log and min(reduced.low.min() for reduced in drawn) > 0 and large / small > _LOG_RATIO:
        plot.set_yscale("log")
    if chart.level is not None and (chart.level > 0 or plot.get_yscale() == "linear"):
        low, high = min(low, chart.level), max(high, chart.level)
    if chart.x_log:
        plot.set_xscale("log")
    x = np.concatenate([reduced.x for reduced in drawn])
    plot.margins(0.015 if chart.x_from_zero or chart.x_log else 0.12, 0.06 if chart.x_from_zero else 0.12)
    plot.update_datalim([(x.min(), low), (x.max(), high)])
    plot.autoscale_view()
    plot.autoscale(False)
    if chart.x_from_zero and not chart.x_log:
        plot.set_xlim(left=min(0.0, x.min()))
    if plot.get_yscale() == "linear" and 0 <= low < 0.35 * high:
        plot.set_ylim(bottom=0)
    for axis, (start, stop) in ((plot.xaxis, plot.get_xlim()), (plot.yaxis, plot.get_ylim())):
        _set_ticks(axis, start, stop)
    plot.tick_params(which="both", left=False, bottom=False, labelsize=10, labelcolor=_SOFT)
    plot.set_xlabel(chart.x_label, loc="right", labelpad=1, fontsize=10, color=_SOFT)
    plot.grid(axis="y", color=_RULE)
    plot.set_axisbelow(True)
    plot.spines[["top", "left", "right"]].set_visible(False)
    plot.spines["bottom"].set_color(_RULE)


def _extent(reduced: Reduced) -> tuple[float, float]:
    """Lowest and highest value to show; rare spikes of a long log may leave the axis."""
    rare = 0.7 if len(reduced.x) >= MAX_POINTS else 0.0
    low, high = float(np.percentile(reduced.low, rare)), float(np.percentile(reduced.high, 100 - rare))
    return min(low, float(reduced.mean[-1])), max(high, float(reduced.mean[-1]))


def _set_ticks(axis: Axis, start: float, stop: float) -> None:
    """About five round numbers; powers of ten, and with them 3 or 2 and 5, where the axis is logarithmic."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    decades = np.log10(stop / start) if axis.get_scale() == "log" else 0.0
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(short_number)


def _label_points(plot: Axes, drawn: Sequence[Series]) -> None:
    """Write labels above and below their points in turn, so that those of neighbours keep clear of each other."""
    for series in drawn:
        for number, label in enumerate(series.labels):
            x, y = series.curve.x[number], series.curve.y[number]
            if np.isfinite([x, y]).all():
                plot.annotate(
                    one_line(label), (x, y), xytext=(0, -10 if number % 2 else 10), textcoords="offset points",
                    ha="center", va="center", fontsize=9, color=_SOFT,
                )  # fmt: skip


def _for_page(drawing: str, title: str) -> str:
    """matplotlib's file as an element of the page: its size, letters and neutral colours are the page's."""
    drawing = drawing[drawing.index("<svg") :].replace("xlink:href", "href")
    view = re.search(r'viewBox="[^"]*"', drawing)
    assert view is not None, drawing[:200]
    head = f'<svg {view[0]} role="img" aria-label="{html.escape(title)}">'
    for pattern, better in (
        (r"^<svg[^>]*>", head),
        (r"<style.*?</style>|font-family: [^;]*;", ""),
        (r' id="[A-Za-z0-9.]+_\d+"', ""),  # repeat from chart to chart
        (r' transform="rotate\(-0 [^"]*"', ""),
        (r">\s+<", "><"),
    ):
        drawing = re.sub(pattern, lambda _, better=better: better, drawing, flags=re.DOTALL)  # type: ignore[misc]
    # paths with tenths of a pixel, in place of millionths
    drawing = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\s+", " ", re.sub(r"(\.\d)\d+", r"\1", path[0])), drawing)
    for color, of_page in OF_PAGE.items():
        drawing = drawing.replace(color, of_page)
    return drawing.strip()
