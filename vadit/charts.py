"""Line charts as inline SVG, for the report: crisp, small, and without a plotting library.

A curve of any length becomes at most `MAX_POINTS` points: the mean of each of so many equal stretches of the log,
over a pale band from minimum to maximum, so that a single spike stays visible.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 150
"""Points of one curve: one for about two pixels of a chart on the page."""

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 30
_LOG_RATIO = 20.0
"""Positive curves whose 95th percentile is so many times the 5th are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Curve:
    """A quantity over a run: x in images, y in its unit; values that are not finite are left out and counted."""

    x: np.ndarray
    y: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Which points are numbers, bool (n,)."""
        return np.isfinite(self.y)


@dataclass(frozen=True)
class _Reduced:
    """Means and extremes of consecutive points, each (m,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reduce_curve(x: np.ndarray, y: np.ndarray, points: int = MAX_POINTS) -> _Reduced:
    """At most `points` consecutive groups of nearly equal size of a curve (n,)."""
    count = min(points, len(y))
    starts = np.linspace(0, len(y), count + 1).astype(int)[:-1]
    sizes = np.diff(np.append(starts, len(y)))
    return _Reduced(
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


def line_chart(title: str, curve: Curve, *, may_be_log: bool = True, x_label: str = "images") -> str:
    """One curve as an SVG element with axes, or an empty string where no value is finite.

    `may_be_log` allows a logarithmic axis for a positive curve that spans decades.
    """
    keep = curve.finite
    if not keep.any():
        return ""
    reduced = reduce_curve(curve.x[keep].astype(np.float64), curve.y[keep].astype(np.float64))
    logarithmic = may_be_log and _wants_log(reduced)
    low, high = _limits(reduced, logarithmic)
    right = max(float(reduced.x[-1]), 1.0)

    def place_x(value: np.ndarray | float) -> np.ndarray:
        return _LEFT + np.asarray(value) / right * (_WIDTH - _LEFT - _RIGHT)

    def place_y(value: np.ndarray | float) -> np.ndarray:
        scaled = np.log10(np.maximum(value, 1e-300)) if logarithmic else np.asarray(value)
        share = np.clip((scaled - low) / (high - low), 0, 1)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    label = f"{html.escape(title, quote=True)} over {x_label}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    for value, label in _y_ticks(low, high, logarithmic):
        y = float(place_y(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value in _nice_ticks(0, right, 5):
        x = float(place_x(value))
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{short_number(value)}</text>'
        )
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">{x_label}</text>')
    band_x = np.concatenate([reduced.x, reduced.x[::-1]])
    band_y = np.concatenate([reduced.high, reduced.low[::-1]])
    if curve.finite.sum() > MAX_POINTS:
        parts.append(f'<polygon class="band" points="{_points(place_x(band_x), place_y(band_y))}"/>')
    parts.append(f'<polyline class="curve" points="{_points(place_x(reduced.x), place_y(reduced.mean))}"/>')
    end_x, end_y = float(place_x(reduced.x[-1])), float(place_y(reduced.mean[-1]))
    parts.append(f'<circle class="end" cx="{end_x:.1f}" cy="{end_y:.1f}" r="2.6"/></svg>')
    return "".join(parts)


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _wants_log(reduced: _Reduced) -> bool:
    if reduced.low.min() <= 0:
        return False
    small, large = np.percentile(reduced.mean, [5, 95])
    return bool(large / small > _LOG_RATIO)


def _limits(reduced: _Reduced, logarithmic: bool) -> tuple[float, float]:
    """Bottom and top of the axis, in value or log10 of it; rare spikes of a long log may leave it."""
    rare = 0.7 if len(reduced.x) >= MAX_POINTS else 0.0
    low, high = float(np.percentile(reduced.low, rare)), float(np.percentile(reduced.high, 100 - rare))
    low, high = min(low, float(reduced.mean[-1])), max(high, float(reduced.mean[-1]))
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        margin = 0.5 * max(abs(high), 1e-12) if not logarithmic else 0.5
        return low - margin, high + margin
    margin = 0.06 * (high - low)
    bottom = 0.0 if not logarithmic and 0 <= low < 0.35 * high else low - margin
    return bottom, high + margin


def _y_ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    if not logarithmic:
        return [(value, short_number(value)) for value in _nice_ticks(low, high, 5)]
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 3) if high - low > 1.2 else (1, 2, 5)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    every = math.ceil(len(inside) / 6)
    return [(value, short_number(value)) for value in inside[::every]]


def _nice_ticks(low: float, high: float, target: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) inside [low, high], about `target` of them."""
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((factor for factor in (1, 2, 5) if factor * power >= raw), 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
