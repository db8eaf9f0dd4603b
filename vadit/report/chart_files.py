"""The report's charts as PNGs, drawn by matplotlib: for slides and papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vadit.report.charts import MAX_POINTS, Axes, Chart, axes, spots
from vadit.runtime.files import whole_file

_DPI = 150
_POINTS = 0.75
"""Points of this drawing to a unit of the page's."""


def save_png(chart: Chart, path: Path) -> bool:
    """Draw `chart` into the file `path`, whole or not at all; False where it has no finite value to show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = axes(chart)
    if found is None:
        return False
    figure = Figure(figsize=(8, 4.2), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.09, right=0.985, top=0.91, bottom=0.125)  # a layout engine would draw it twice
    plot = figure.add_subplot()
    _draw(chart, found, plot)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")
    return True


def _draw(chart: Chart, found: Axes, plot: Any) -> None:
    for series, reduced in found.drawn:
        if series.marks:
            face = "white" if series.hollow else series.shade
            plot.scatter(
                reduced.x, reduced.mean, s=32, facecolors=face, edgecolors=series.shade, label=series.name, zorder=4
            )
            continue
        if series.curve.finite.sum() > MAX_POINTS:
            plot.fill_between(reduced.x, reduced.low, reduced.high, color=series.shade, alpha=0.15, linewidth=0)
        style = "--" if series.dashed else "-"
        plot.plot(reduced.x, reduced.mean, style, color=series.shade, linewidth=1.7, label=series.name)
    anchors = {"start": "left", "middle": "center", "end": "right"}
    for spot in spots(found):
        plot.annotate(spot.label, (spot.x, spot.y), textcoords="offset points",
                      xytext=(spot.offset[0] * _POINTS, -spot.offset[1] * _POINTS), ha=anchors[spot.anchor],
                      fontsize=7.5, color="#5b6475")  # fmt: skip
    if chart.level is not None:
        plot.axhline(chart.level, color="#7a8394", linestyle=(0, (2, 3)), linewidth=1)
    plot.set_yscale("log" if found.logarithmic else "linear")
    low, high = found.y
    plot.set_ylim(*(10.0 ** np.array(found.y) if found.logarithmic else (low, high)))
    plot.set_xscale("log" if found.x_log else "linear")
    left, right = found.x
    right += 0.015 * (right - left)
    plot.set_xlim(*((10.0**left, 10.0**right) if found.x_log else (left, right)))
    # the page's own ticks, so that the two drawings of a chart read alike
    for axis, ticks in ((plot.xaxis, found.x_ticks()), (plot.yaxis, found.y_ticks())):
        axis.set_ticks([value for value, _ in ticks], [label for _, label in ticks])
        axis.set_minor_locator(_no_ticks())
    plot.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", color="#1d2433")
    plot.set_xlabel(chart.x_label)
    plot.set_ylabel(chart.y_label)
    plot.grid(axis="y", color="#e3e7ee")
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    if len(found.drawn) > 1:
        plot.legend(frameon=False, fontsize=9)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
