"""The report's charts: where curves, marks and letters stand, and which charts are not worth drawing."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest

from vadit.report.charts import (
    MAX_POINTS,
    PALETTE,
    Chart,
    Curve,
    Series,
    draw,
    is_worth_drawing,
    reduce_curve,
    svg,
)


def line_chart(x: Sequence[float], y: Sequence[float], **settings: object) -> str:
    """One curve as SVG."""
    series = (Series("run", Curve(np.array(x, float), np.array(y, float))),)
    return svg(Chart("a <b>", series, **settings))  # type: ignore[arg-type]


def line(drawing: str, color: str = PALETTE[0]) -> np.ndarray:
    """Points (n, 2) of the line in that colour, in pixels."""
    found = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {color}', drawing)
    assert found is not None, drawing
    return np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", found[1]), float)


def ticks(drawing: str) -> tuple[dict[str, float], dict[str, float]]:
    """Labels of the two axes, and where they stand: x of those below, y of the baselines of those at the left."""
    found = re.findall(r'text-anchor: (middle|end)[^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', drawing)
    below = {label: float(x) for anchor, x, _, label in found if anchor == "middle"}
    return below, {label: float(y) for anchor, x, y, label in found if anchor == "end" and x == "45"}


def test_reduced_curves_keep_means_and_extremes() -> None:
    x, y = np.arange(10.0), np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 90])
    reduced = reduce_curve(x, y, points=3)
    assert reduced.x.tolist() == [1, 4, 7.5]
    assert reduced.mean.tolist() == [1, 4, pytest.approx(27.75)]
    assert (reduced.low.tolist(), reduced.high.tolist()) == ([0, 3, 6], [2, 5, 90])
    same = reduce_curve(x, y)
    assert same.mean.tolist() == y.tolist()


def test_curves_on_a_logarithmic_axis_keep_their_beginning() -> None:
    x = np.arange(1.0, 100_001)
    reduced = reduce_curve(x, x, points=50, by_log=True)
    assert reduced.x[:3].tolist() == [1, 2, 3]  # groups of equal size would begin with the mean of 2,000
    assert (np.diff(reduced.x) > 0).all() and 30 < len(reduced.x) <= 50
    drawing = line_chart(x, x, x_log=True)
    assert list(ticks(drawing)[0]) == ["1", "10", "100", "1000", "10k", "100k"]
    assert np.ptp(np.diff(list(ticks(drawing)[0].values()))) < 0.01


@pytest.mark.parametrize(
    "y",
    [[1.0], [0.0, 0.0], [5.0, 5.0, 5.0], [1e-6, 1e3, 1.0], [-2.0, 3.0], [math.nan, 1.0, math.inf], [1e12, 2e12]],
)  # fmt: skip
def test_charts_of_odd_curves_stay_inside_their_frame(y: list[float]) -> None:
    drawing = line_chart(np.arange(1, len(y) + 1) * 1000, y)
    assert "a &lt;b&gt;" in drawing and not re.search("nan|inf[^o]", drawing)
    points = line(drawing) if np.isfinite(y).sum() > 1 else np.zeros((0, 2))
    assert len(points) == (np.isfinite(y).sum() if len(points) else 0)
    assert ((points >= (52, 12)) & (points <= (306, 156))).all()
    assert all(ticks(drawing))


def test_a_chart_puts_values_where_its_ticks_say() -> None:
    drawing = line_chart([0, 5, 10, 20], [0, 1, math.nan, 4])
    below, left = ticks(drawing)
    assert line(drawing)[:, 0] == pytest.approx([below[value] for value in ("0", "5", "20")], abs=0.15)
    rise = (left["0"] - left["4"]) / 4
    assert line(drawing)[:, 1] == pytest.approx([156 - rise * y for y in (0, 1, 4)], abs=0.15)
    assert line_chart([1], [math.nan]) == ""
    # powers of ten, from the first x above zero
    drawing = line_chart([0, 1, 10, 100], [7, 0.01, 1, 100], x_log=True)
    below, left = ticks(drawing)
    assert line(drawing)[:, 0] == pytest.approx([below["1"], below["10"], below["100"]], abs=0.15)
    assert left["0.01"] - left["1"] == pytest.approx(left["1"] - left["100"], abs=0.01)
    assert line(drawing)[0, 1] - line(drawing)[1, 1] == pytest.approx(left["0.01"] - left["1"], abs=0.15)
    drawing = line_chart([0, 10], [1, 2], level=4.0)
    left = ticks(drawing)[1]
    (level,) = re.findall(r'd="M 52 ([\d.]+) L 306 \1[^>]*stroke-dasharray', drawing)
    assert float(level) + left["2"] - line(drawing)[1, 1] == pytest.approx(left["4"], abs=0.15)


def test_flat_and_empty_charts_are_not_drawn() -> None:
    def chart(*curves: list[float], style: str = "line") -> Chart:
        series = (Series("s", Curve(np.arange(float(len(y))), np.array(y)), style=style) for y in curves)  # type: ignore
        return Chart("t", tuple(series))

    for flat in ([], [1.0], [math.nan] * 3, [1.0, math.nan], [0.0, 0.0], [500.0, 503.0], [-1.0, -1.0]):
        assert not is_worth_drawing(chart(flat)) and not is_worth_drawing(chart(flat, [3.0, 3.0]))
        assert is_worth_drawing(chart(flat, [3.0, 4.0]))
    assert is_worth_drawing(chart([1.0], style="dots")) and not is_worth_drawing(chart([math.nan], style="dots"))


def test_long_curves_have_a_band_from_their_lowest_to_their_highest() -> None:
    y = np.where(np.arange(3000) % 2, 3.0, 1.0)
    y[1500] = 9.0  # its stretch alone goes up: rare spikes leave the axis
    drawing = line_chart(np.arange(3000), y)
    band = re.search(rf'<path d="([^"]*)"[^>]*style="fill: {PALETTE[0]}; fill-opacity', drawing)
    heights = np.array(re.findall(r"[ML] [-\d.]+ ([-\d.]+)", band[1]), float)
    left = ticks(drawing)[1]
    shift = left["2"] - np.median(line(drawing)[:, 1])
    for value in ("1", "3"):
        assert (np.abs(heights + shift - left[value]) < 0.2).sum() >= 148
    assert len(line(drawing)) <= MAX_POINTS


def test_drawings_are_the_same_each_time_and_have_the_colours_of_their_curves() -> None:
    names = ("line", "dashed", "dots", "rings")
    series = tuple(Series(style, Curve(np.arange(3.0), np.arange(3.0) + n), n, style) for n, style in enumerate(names))
    chart = Chart(r"$\frac{", series, wide=True)  # no formula
    assert svg(chart) == svg(chart)
    assert all(re.search(f"(fill|stroke): {color}", svg(chart)) for color in PALETTE[:4])
    assert svg(Chart("t", ())) == ""
    assert len(re.findall("<use", svg(chart))) == 2 + 3 + 3  # lines have a dot at their end
    assert len(re.findall("stroke-dasharray", svg(chart))) == 1


def test_labels_of_marks_stay_in_the_plot() -> None:
    curve = Curve(np.array([0.28, 0.281, np.nan, 0.5]), np.array([8.2, 8.2, 1, 20.0]))
    marks = Series("s", curve, 1, "rings", ("left", "middle", "lost", "right"))
    (plot,) = draw(Chart("t", (marks,), x_from_zero=False), 760, 330).axes
    assert [text.get_text() for text in plot.texts] == ["left", "middle", "right"]
    boxes = [text.get_window_extent() for text in plot.texts]
    assert all(plot.bbox.x0 <= box.x0 and box.x1 <= plot.bbox.x1 for box in boxes)
    assert sum(box.count_overlaps(boxes) for box in boxes) == 3  # itself
