"""The report: one file that needs no network, for logs of any length, and the pictures in it."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vadit.report.charts import MAX_POINTS, PALETTE, Chart, Curve, Series, draw, reduce_curve, save_png, svg
from vadit.report.log import read_log
from vadit.report.page import Section, write_report
from vadit.report.runs import read_runs
from vadit.report.sections import quantity_charts


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


def test_a_report_of_a_long_run_is_one_small_file_without_outside_links(tmp_path: Path) -> None:
    loss = 1 / np.sqrt(np.arange(1, 80_001))
    with (tmp_path / "log.jsonl").open("w") as stream:
        for index, value in enumerate(loss.tolist()):
            line = {"images": index * 64, "step": index, "loss": value, "images_per_s": 100.0 + index % 7}
            stream.write(json.dumps(line | {"grad_norm": float("nan") if index == 1 else 0.5}) + "\n")
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1500, 3), dtype=np.uint8)  # PNG cannot shrink it: 5 MB
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "config.json").write_text('{"note": "a < b & c"}')
    sections = [
        Section("s", quantity_charts(read_runs([tmp_path])), [("noise & more", tmp_path / "noise.png")]),
        Section("t", table=[("FID", "34.4 dB")], header=("", "with"), settings=[("All", tmp_path / "config.json")]),
    ]
    out = write_report(tmp_path / "sub" / "report.html", "Run <1>", "First & last.", sections)
    assert list(out.parent.iterdir()) == [out] and out.stat().st_size < 3_500_000
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", out.read_text())
    assert set(re.findall(r' src="([^"]*)"', text)) == {"data:image/jpeg;"}
    assert not re.search(r"https?:|//[a-z]|@import|srcset|url\((?!#)", text)
    drawings = re.findall("<svg.*?</svg>", text)
    assert len(drawings) == 3 and all(ElementTree.fromstring(drawing).tag == "svg" for drawing in drawings)
    # the page's colours, in light and dark; and everything that is referred to is there
    assert "prefers-color-scheme: dark" in text and not re.search(r"(fill|stroke): #(ffffff|000000)", text)
    assert {*re.findall(r'(?:url\(|href=")#(\w+)', text)} <= {*re.findall(r' id="(\w+)"', text)}
    for expected in ("Run &lt;1&gt;", '<p class="lead">First &amp; last.</p>', "34.4 dB", "<th>with</th>", "a &lt; b"):
        assert expected in text
    assert text.count("1 not finite") == 1


def test_small_pictures_are_embedded_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "tiny.png"
    Image.new("RGB", (40, 40), (3, 60, 200)).save(path)
    text = write_report(tmp_path / "r.html", "t", "", [Section("s", images=[("c", path)])]).read_text()
    assert f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" in text


def test_a_log_forgets_what_a_resumed_run_did_again_and_skips_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    points = [(64, 3.0), (128, 2.0), (192, 1.5), (128, 2.1), (192, 1.6), (256, 1.2)]
    lines = [json.dumps({"images": images, "step": images // 64, "loss": loss}) for images, loss in points]
    lines.insert(3, '{"images": 256, "st')
    lines.append('{"images": 320, "step": 5, "loss": 1.1, "kl": 4, "where": "a"}')
    path.write_text("\n".join(lines))
    log = read_log(path)
    assert log.skipped_lines == 1
    assert list(log.curves) == ["loss", "kl"]
    assert log.curves["loss"].x.tolist() == [64, 128, 192, 256, 320]
    assert log.curves["loss"].y.tolist() == [3.0, 2.1, 1.6, 1.2, 1.1]
    assert log.curves["kl"].x.tolist() == [320]
    assert log.lines == [{"images": 320, "where": "a"}]


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


def test_a_level_is_drawn_inside_the_axes() -> None:
    drawing = line_chart([0, 10], [1, 2], level=4.0)
    left = ticks(drawing)[1]
    (level,) = re.findall(r'd="M 52 ([\d.]+) L 306 \1[^>]*stroke-dasharray', drawing)
    assert float(level) + left["2"] - line(drawing)[1, 1] == pytest.approx(left["4"], abs=0.15)


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


def test_drawings_are_the_same_each_time_and_have_the_colours_of_their_curves(tmp_path: Path) -> None:
    names = ("line", "dashed", "dots", "rings")
    series = tuple(Series(style, Curve(np.arange(3.0), np.arange(3.0) + n), n, style) for n, style in enumerate(names))
    chart = Chart(r"$\frac{", series, wide=True)  # no formula
    assert svg(chart) == svg(chart)
    assert save_png(chart, tmp_path / "t.png") and not save_png(Chart("t", ()), tmp_path / "none.png")
    pixels = np.asarray(Image.open(tmp_path / "t.png").convert("RGB"))
    for number in range(4):
        color = [int(PALETTE[number][i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == color).all(-1).sum() > 20, names[number]
    assert len(re.findall("<use", svg(chart))) == 2 + 3 + 3  # lines have a dot at their end
    assert len(re.findall("stroke-dasharray", svg(chart))) == 1


def test_labels_of_marks_cover_no_other_and_no_mark() -> None:
    own = Series("own", Curve(np.array([0.282]), np.array([8.3])), style="dots")
    curve = Curve(np.array([0.28, 0.281, np.nan, 0.279, 0.5]), np.array([8.22, 8.25, 1, 8.2, 20.0]))
    marks = Series("s", curve, 1, "rings", ("one", "two", "lost", "three", "four"))
    figure = draw(Chart("t", (own, marks), x_from_zero=False), 760, 330)
    (plot,) = figure.axes
    assert [text.get_text() for text in plot.texts] == ["one", "two", "three", "four"]
    boxes = [text.get_window_extent() for text in plot.texts]
    assert sum(box.count_overlaps(boxes) for box in boxes) == 4  # itself
    assert not any(box.contains(*plot.transData.transform((0.282, 8.3))) for box in boxes)
