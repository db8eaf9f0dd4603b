"""Charts: what is drawn, its axes, and the drawing as inline SVG; `chart_files` draws the same ones as PNGs.

A curve of any length becomes at most `MAX_POINTS` points: the mean of each of so many equal stretches of the log,
over a pale band from minimum to maximum, so that a single spike stays visible.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 150
"""Points of one curve: one for about two pixels of a small chart on the page."""
PALETTE = ("#2f6fde", "#e4572e", "#2a9d6f", "#8e5bd0", "#c98a04", "#0e9aa7", "#c2417c", "#5b6475")
"""Colours of runs, in their order; they go round."""

_SMALL, _WIDE = (380, 210), (760, 330)
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 30
_LOG_RATIO = 20.0
"""Positive curves whose 95th percentile is so many times the 5th are drawn on a logarithmic axis."""
_LETTER = 5.6
"""Width of a letter of a label, in the drawing's units."""


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

    name: str
    """What the legend says."""
    curve: Curve
    color: int = 0
    """Index into PALETTE, which goes round."""
    marks: bool = False
    """Points alone, not a line through them."""
    hollow: bool = False
    """Marks that are open circles: published values, not measured ones."""
    dashed: bool = False
    """A line of dashes: projected, not measured."""
    labels: tuple[str, ...] = ()
    """A word at each mark."""

    @property
    def shade(self) -> str:
        """The colour as #rrggbb."""
        return PALETTE[self.color % len(PALETTE)]


@dataclass(frozen=True)
class Chart:
    """Curves on one pair of axes; drawn by `svg` and by `chart_files.save_png`."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "images"
    y_label: str = ""
    may_be_log: bool = True
    """Allows a logarithmic axis for positive values that span decades."""
    x_from_zero: bool = True
    """Whether the horizontal axis starts at zero."""
    x_log: bool = False
    """A logarithmic horizontal axis, from the first value above zero."""
    level: float | None = None
    """Height of a dashed horizontal line."""
    wide: bool = False
    """As wide as the page, with a legend of its own."""
    note: str = ""
    """A sentence below it."""
    file: str = ""
    """Name of its PNG, without the ending; empty for none."""


# ------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Reduced:
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


def short_number(value: float) -> str:
    """A number in few characters: 81.9M, 12k, 0.304, 1.5e-06."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"


def nice_ticks(low: float, high: float, target: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) inside [low, high], about `target` of them."""
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((factor for factor in (1, 2, 5) if factor * power >= raw), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


# ------------------------------------------------------------------------------------------ axes


@dataclass(frozen=True)
class Axes:
    """What a chart shows once its curves are reduced, and the limits that hold it."""

    drawn: tuple[tuple[Series, Reduced], ...]
    """Series with a finite value, and their points; marks are not reduced."""
    x: tuple[float, float]
    y: tuple[float, float]
    """In value, or log10 of it; x, too."""
    logarithmic: bool
    """Whether y is."""
    x_log: bool

    def y_ticks(self) -> list[tuple[float, str]]:
        """Values and their labels."""
        return _ticks(self.y, self.logarithmic)

    def x_ticks(self) -> list[tuple[float, str]]:
        """Values and their labels."""
        return _ticks(self.x, self.x_log)


def _ticks(limits: tuple[float, float], logarithmic: bool) -> list[tuple[float, str]]:
    low, high = limits
    if not logarithmic:
        return [(value, short_number(value)) for value in nice_ticks(low, high, 5)]
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 3) if high - low > 1.2 else (1, 2, 5)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    every = max(math.ceil(len(inside) / 6), 1)
    return [(value, short_number(value)) for value in inside[::every]]


def axes(chart: Chart) -> Axes | None:
    """The axes of a chart, or None where no value is finite."""
    drawn = []
    for series in chart.series:
        keep = series.curve.finite & (series.curve.x > 0) if chart.x_log else series.curve.finite
        if keep.any():
            x, y = series.curve.x[keep].astype(np.float64), series.curve.y[keep].astype(np.float64)
            points = len(x) if series.marks else MAX_POINTS
            drawn.append((series, reduce_curve(x, y, points, by_log=chart.x_log and not series.marks)))
    if not drawn:
        return None
    logarithmic = chart.may_be_log and _wants_log([reduced for _, reduced in drawn])
    low, high = zip(*(_extent(reduced) for _, reduced in drawn), strict=True)
    levels = [] if chart.level is None or (logarithmic and chart.level <= 0) else [chart.level]
    share = 0.06 if chart.x_from_zero or chart.x_log else 0.12
    y = _with_margin(min(*low, *levels, math.inf), max(*high, *levels, -math.inf), logarithmic, share)
    left, right = (find(float(find(reduced.x)) for _, reduced in drawn) for find in (min, max))
    if chart.x_log:
        x_limits = _with_margin(left, right, logarithmic=True, share=0.0)
    elif chart.x_from_zero:
        x_limits = (min(0.0, left), right if right > 0 else 1.0)
    else:
        x_limits = _with_margin(left, right, logarithmic=False, share=0.12, to_zero=False)
    return Axes(tuple(drawn), x_limits, y, logarithmic, chart.x_log)


def _wants_log(drawn: Sequence[Reduced]) -> bool:
    if min(float(reduced.low.min()) for reduced in drawn) <= 0:
        return False
    small, large = np.percentile(np.concatenate([reduced.mean for reduced in drawn]), [5, 95])
    return bool(large / small > _LOG_RATIO)


def _extent(reduced: Reduced) -> tuple[float, float]:
    """Lowest and highest value to show; rare spikes of a long log may leave the axis."""
    rare = 0.7 if len(reduced.x) >= MAX_POINTS else 0.0
    low, high = float(np.percentile(reduced.low, rare)), float(np.percentile(reduced.high, 100 - rare))
    return min(low, float(reduced.mean[-1])), max(high, float(reduced.mean[-1]))


def _with_margin(
    low: float, high: float, logarithmic: bool, share: float = 0.06, to_zero: bool = True
) -> tuple[float, float]:
    """Limits with room above and below; near zero the axis goes down to it."""
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        margin = 0.5 if logarithmic else 0.5 * max(abs(high), 1e-12)
        return low - margin, high + margin
    margin = share * (high - low)
    bottom = 0.0 if to_zero and not logarithmic and 0 <= low < 0.35 * high else low - margin
    return bottom, high + margin


# ------------------------------------------------------------------------------------------ SVG


def svg(chart: Chart) -> str:
    """A chart as an SVG element, or an empty string where no value is finite."""
    found = axes(chart)
    if found is None:
        return ""
    width, height = _WIDE if chart.wide else _SMALL
    place = _Place(found, width, height)
    title = html.escape(f"{chart.title} over {chart.x_label}", quote=True)
    # all looks are attributes, so that the drawing is the same wherever it is pasted
    look = 'fill="#7a8394" font-size="10.5" font-family="system-ui, sans-serif"'
    parts = [f'<svg viewBox="0 0 {width} {height}" {look} role="img" aria-label="{title}">']
    for value, label in found.y_ticks():
        y = float(place.y(value))
        parts.append(f'<line stroke="#edf0f5" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    base = height - _BOTTOM
    for value, label in found.x_ticks():
        parts.append(f'<text x="{float(place.x(value)):.1f}" y="{base + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<line stroke="#c9d0db" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{base}" y2="{base}"/>')
    end = html.escape(chart.x_label)
    parts.append(f'<text x="{width - _RIGHT}" y="{height - 2}" text-anchor="end">{end}</text>')
    if chart.level is not None:
        y = float(place.y(chart.level))
        ends = f'x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line stroke="#7a8394" stroke-dasharray="2 4" {ends}/>')
    lines = [(series, reduced) for series, reduced in found.drawn if not series.marks]
    parts += [_band(series, reduced, place) for series, reduced in lines]
    parts += [_line(series, reduced, place) for series, reduced in lines]
    parts += _marks(place)
    return "".join(parts) + "</svg>"


@dataclass(frozen=True)
class _Place:
    """Where values lie in the drawing."""

    axes: Axes
    width: int
    height: int

    def x(self, value: np.ndarray | float) -> np.ndarray:
        low, high = self.axes.x
        scaled = np.log10(np.maximum(value, 1e-300)) if self.axes.x_log else np.asarray(value)
        return _LEFT + np.clip((scaled - low) / (high - low), 0, 1) * (self.width - _LEFT - _RIGHT)

    def y(self, value: np.ndarray | float) -> np.ndarray:
        low, high = self.axes.y
        scaled = np.log10(np.maximum(value, 1e-300)) if self.axes.logarithmic else np.asarray(value)
        share = np.clip((scaled - low) / (high - low), 0, 1)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def _band(series: Series, reduced: Reduced, place: _Place) -> str:
    if series.curve.finite.sum() <= MAX_POINTS:
        return ""
    x, y = np.concatenate([reduced.x, reduced.x[::-1]]), np.concatenate([reduced.high, reduced.low[::-1]])
    return f'<polygon fill="{series.shade}" opacity=".13" points="{_points(place.x(x), place.y(y))}"/>'


def _line(series: Series, reduced: Reduced, place: _Place) -> str:
    dashes = ' stroke-dasharray="5 4"' if series.dashed else ""
    line = (
        f'<polyline fill="none" stroke="{series.shade}" stroke-width="1.6" stroke-linejoin="round"{dashes} '
        f'points="{_points(place.x(reduced.x), place.y(reduced.mean))}"/>'
    )
    x, y = float(place.x(reduced.x[-1])), float(place.y(reduced.mean[-1]))
    return f'{line}<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{series.shade}"/>'


@dataclass(frozen=True)
class Spot:
    """A mark and its label: where they are in values, and how far the label stands from the mark, in units."""

    series: Series
    x: float
    y: float
    label: str
    offset: tuple[float, float]
    anchor: str
    """start, middle or end of the label is what stands there."""


def spots(found: Axes, width: int = _WIDE[0], height: int = _WIDE[1]) -> list[Spot]:
    """All marks of a chart of that size, their labels beside them so that few of them cover anything."""
    place = _Place(found, width, height)
    marks = [
        (series, float(x), float(y), label)
        for series, reduced in found.drawn
        if series.marks
        for x, y, label in zip(reduced.x, reduced.mean, _labels(series, len(reduced.x)), strict=True)
    ]
    centres = [(float(place.x(x)), float(place.y(y))) for _, x, y, _ in marks]
    taken = [(left - 4, top - 4, left + 4, top + 4) for left, top in centres]
    result = []
    for (series, x, y, label), (left, top) in zip(marks, centres, strict=True):
        dx, dy, anchor = _beside(left, top, label, width, taken) if label else (0.0, 0.0, "start")
        result.append(Spot(series, x, y, label, (dx, dy), anchor))
    return result


def _marks(place: _Place) -> list[str]:
    circles, texts = [], []
    for spot in spots(place.axes, place.width, place.height):
        series, left, top = spot.series, float(place.x(spot.x)), float(place.y(spot.y))
        look = f'fill="#fff" stroke="{series.shade}" stroke-width="1.5"' if series.hollow else f'fill="{series.shade}"'
        told = html.escape(f"{spot.label or series.name}: {short_number(spot.x)}, {short_number(spot.y)}")
        circles.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.6" {look}><title>{told}</title></circle>')
        if spot.label:
            where = f'x="{left + spot.offset[0]:.1f}" y="{top + spot.offset[1]:.1f}" text-anchor="{spot.anchor}"'
            texts.append(f"<text {where}>{html.escape(spot.label)}</text>")
    return circles + texts


def _labels(series: Series, count: int) -> Sequence[str]:
    if not series.labels:
        return [""] * count
    return [label for label, keep in zip(series.labels, series.curve.finite, strict=True) if keep]


def _beside(
    left: float, top: float, label: str, width: float, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str]:
    """Offset and anchor of a label next to a mark where it covers nothing, if there is such a place; it is noted."""
    length = _LETTER * len(label)
    places = [(7.0, dy, "start") for dy in (3.5, -5.0, 12.0)] + [(-7.0, dy, "end") for dy in (3.5, -5.0, 12.0)]
    places += [(0.0, dy, "middle") for dy in (-8.0, 16.0)]
    boxes = []
    for dx, dy, anchor in places:
        start = left + dx - {"start": 0.0, "end": length, "middle": length / 2}[anchor]
        boxes.append((start, top + dy - 8, start + length, top + dy + 1))
    free = [
        number
        for number, (a, b, c, d) in enumerate(boxes)
        if a > _LEFT and c < width and all(c < e or g < a or d < f or h < b for e, f, g, h in taken)
    ]
    best = free[0] if free else 0
    taken.append(boxes[best])
    return places[best]


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
