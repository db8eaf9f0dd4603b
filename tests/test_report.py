"""The report: one file that needs no network, for logs of any length, and the pictures in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vadit.images.pixels import image_grid, reconstruction_pairs
from vadit.report.charts import (
    MAX_POINTS,
    PALETTE,
    Chart,
    Curve,
    Series,
    draw,
    reduce_curve,
    save_png,
    short_number,
    svg,
)
from vadit.report.log import read_log
from vadit.report.page import Section, write_report
from vadit.report.runs import read_runs
from vadit.report.sections import quantity_charts
from vadit.runtime.errors import UsageError


def write_log(path: Path, count: int) -> Path:
    """A log with a spike in the middle and a NaN near the start."""
    loss = 1 / np.sqrt(np.arange(1, count + 1))
    loss[count // 2] = 7.0
    with path.open("w") as stream:
        for index in range(count):
            line = {
                "images": (index + 1) * 64,
                "step": index + 1,
                "loss": loss[index],
                "images_per_s": 100.0 + index % 7,
            }
            line["grad_norm"] = float("nan") if index == 1 else 0.5
            stream.write(json.dumps(line) + "\n")
    return path


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


class Reader(HTMLParser):
    """Collects what a browser would fetch, and checks that elements close in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_of_a_long_run_is_one_small_file_without_outside_links(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", 80_000)
    charts = quantity_charts(read_runs([tmp_path]))
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1500, 3), dtype=np.uint8)  # PNG cannot shrink it: 5 MB
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "config.json").write_text('{"note": "a < b & c"}')
    out = write_report(
        tmp_path / "sub" / "report.html",
        "Run <1>",
        "First.\n\nSecond & last.",
        [
            Section(
                "Tokenizer",
                charts=charts,
                images=[("noise & more", tmp_path / "noise.png")],
                table=[("PSNR", "34.4 dB")],
            ),
            Section(
                "Compared",
                header=("", "with", "without"),
                table=[("FID", "1", "2")],
                settings=[("All settings", tmp_path / "config.json")],
            ),
        ],
    )
    text = out.read_text()
    assert out.stat().st_size < 5_000_000
    assert list(out.parent.iterdir()) == [out]
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert all(source.startswith(("data:image/", "#")) for source in reader.sources)
    assert sum(source.startswith("data:image/") for source in reader.sources) == 1
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert reader.counts["svg"] == 3
    assert "prefers-color-scheme: dark" in text and not re.search(r"(fill|stroke): #(ffffff|000000)", text)
    assert {*re.findall(r'(?:url\(|href=")#([pm]\w+)', text)} <= {*re.findall(r' id="(\w+)"', text)}
    for expected in (
        "Run &lt;1&gt;",
        '<p class="lead">Second &amp; last.</p>',
        "34.4 dB",
        "<th>without</th>",
        "a &lt; b",
    ):
        assert expected in text
    assert "1 not finite" in text


def test_small_pictures_are_embedded_byte_by_byte(tmp_path: Path) -> None:
    import base64

    path = tmp_path / "tiny.png"
    Image.new("RGB", (40, 40), (3, 60, 200)).save(path)
    text = write_report(tmp_path / "r.html", "t", "", [Section("s", images=[("c", path)])]).read_text()
    assert f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" in text


def test_a_log_forgets_what_a_resumed_run_did_again_and_skips_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    points = [(64, 3.0), (128, 2.0), (192, 1.5), (128, 2.1), (192, 1.6), (256, 1.2)]
    lines = [json.dumps({"images": images, "step": images // 64, "loss": loss}) for images, loss in points]
    lines.insert(3, '{"images": 256, "st')
    lines.append('{"images": 320, "step": 5, "loss": 1.1, "kl": 4}')
    path.write_text("\n".join(lines))
    log = read_log(path)
    assert log.skipped_lines == 1
    assert list(log.curves) == ["loss", "kl"]
    assert log.curves["loss"].x.tolist() == [64, 128, 192, 256, 320]
    assert log.curves["loss"].y.tolist() == [3.0, 2.1, 1.6, 1.2, 1.1]
    assert log.curves["kl"].x.tolist() == [320]


def test_quantities_that_come_and_go_stay_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [
        {"images": 10 * i, "loss": float(i)} | ({"save_ms": 5, "where": "a"} if i % 3 == 0 else {}) for i in range(9)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    log = read_log(path)
    assert log.curves["loss"].x.tolist() == [10 * i for i in range(9)]
    assert log.curves["loss"].y.tolist() == list(range(9))
    assert log.curves["save_ms"].x.tolist() == [0, 30, 60]
    assert log.lines == [{"images": images, "where": "a"} for images in (0, 30, 60)]


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
    assert band is not None
    heights = np.array(re.findall(r"[ML] [-\d.]+ ([-\d.]+)", band[1]), float)
    left = ticks(drawing)[1]
    shift = left["2"] - np.median(line(drawing)[:, 1])
    for value in ("1", "3"):
        assert (np.abs(heights + shift - left[value]) < 0.2).sum() >= 148
    assert len(line(drawing)) <= MAX_POINTS


def test_drawings_are_the_same_each_time_and_have_the_colours_of_their_curves(tmp_path: Path) -> None:
    names = ("line", "dashed", "dots", "rings")
    series = tuple(Series(style, Curve(np.arange(3.0), np.arange(3.0) + n), n, style) for n, style in enumerate(names))
    chart = Chart("t", series, wide=True)
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
    assert figure is not None
    (plot,) = figure.axes
    assert [text.get_text() for text in plot.texts] == ["one", "two", "three", "four"]
    boxes = [text.get_window_extent() for text in plot.texts]
    assert sum(box.count_overlaps(boxes) for box in boxes) == 4  # itself
    assert not any(box.contains(*plot.transData.transform((0.282, 8.3))) for box in boxes)


def test_short_numbers() -> None:
    found = [short_number(value) for value in (81_920_000, 12_000, 5000, 0.3045, 0.00015, 1.5e-6, 0, -2.5)]
    assert found == ["81.9M", "12k", "5000", "0.3045", "0.00015", "1.5e-06", "0", "-2.5"]


def test_a_grid_holds_each_image_enlarged_without_smoothing() -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * 16 + 2, 3 * 16 + 4, 3)
    np.testing.assert_array_equal(grid[18:34:2, 18:34:2], images[4])
    np.testing.assert_array_equal(grid[19:34:2, 19:34:2], images[4])
    assert (grid[18:, 36:] == 255).all()  # the place of the missing sixth
    assert image_grid(images).size[0] == 3 * 64 + 4  # 8 pixels grow to 64


def test_pairs_stand_one_above_the_other() -> None:
    originals = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    picture = np.asarray(reconstruction_pairs(originals, 255 - originals, columns=3, scale=1))
    height, width = 2 * (2 * 16 + 2) + 10, 3 * 16 + 4
    assert picture.shape[0] == height
    body = picture[:, -width:]
    np.testing.assert_array_equal(body[:16, :16], originals[0])
    np.testing.assert_array_equal(body[18:34, :16], 255 - originals[0])
    np.testing.assert_array_equal(body[44:60, 18:34], originals[4])
    assert picture[:, : -width - 4].min() < 200  # the labels are there
    with pytest.raises(UsageError, match="one shape"):
        reconstruction_pairs(originals, originals[:4])
    with pytest.raises(UsageError, match="uint8"):
        image_grid(originals.astype(np.float32))
