"""The report: one file that needs no network, for logs of any length, and the pictures in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vadit.images.pixels import image_grid, reconstruction_pairs
from vadit.report.charts import Chart, Curve, Series, reduce_curve, short_number, svg
from vadit.report.log import read_log
from vadit.report.page import Section, write_report
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


def line_chart(title: str, curve: Curve, **settings: object) -> str:
    """One curve as SVG."""
    return svg(Chart(title, (Series("run", curve),), **settings))  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Collects what a browser would fetch, and checks that elements close in order."""

    VOID = ("meta", "img", "line", "circle", "polyline", "polygon", "br")

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
    log = write_log(tmp_path / "log.jsonl", 80_000)
    charts = quantity_charts([("run", read_log(log).curves)])
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
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert reader.counts["svg"] == 3
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
    drawing = line_chart("loss", Curve(x, x), x_log=True)
    labels = re.findall(r'text-anchor="middle">([^<]*)<', drawing)
    assert labels == ["1", "10", "100", "1000", "10k"]


@pytest.mark.parametrize(
    "y",
    [
        [1.0],
        [0.0, 0.0],
        [5.0, 5.0, 5.0],
        [1e-6, 1e3, 1.0],
        [-2.0, 3.0],
        [float("nan"), 1.0, float("inf")],
        [1e12, 2e12],
    ],
)
def test_charts_of_odd_curves_stay_inside_their_frame(y: list[float]) -> None:
    drawing = line_chart("a <b>", Curve(np.arange(1.0, len(y) + 1) * 1000, np.array(y)))
    assert "nan" not in drawing and "inf" not in drawing and "a &lt;b&gt;" in drawing
    points = re.search(r'<polyline[^>]* points="([^"]*)"', drawing)
    assert points is not None
    for pair in points[1].split():
        left, top = map(float, pair.split(","))
        assert 0 <= left <= 380 and 0 <= top <= 210
    assert len(re.findall("<text", drawing)) >= 4  # ticks on both axes


def test_a_chart_puts_values_where_its_ticks_say() -> None:
    drawing = line_chart("y", Curve(np.array([0.0, 50.0, 100.0]), np.array([0.0, 1.0, 4.0])))
    ticks = {
        float(label): float(y)
        for y, label in re.findall(r'<text x="46" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', drawing)
    }
    points = re.search(r'<polyline[^>]* points="([^"]*)"', drawing)
    assert points is not None
    heights = [float(pair.split(",")[1]) for pair in points[1].split()]
    assert heights == [pytest.approx(ticks[value] - 3.5, abs=0.11) for value in (0, 1, 4)]
    assert line_chart("y", Curve(np.array([1.0]), np.array([np.nan]))) == ""


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


def test_missing_files_are_named(tmp_path: Path) -> None:
    for section in (
        Section("s", images=[("c", tmp_path / "absent")]),
        Section("s", settings=[("c", tmp_path / "absent")]),
    ):
        with pytest.raises(UsageError, match="absent does not exist"):
            write_report(tmp_path / "r.html", "t", "", [section])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="not a readable picture"):
        write_report(tmp_path / "r.html", "t", "", [Section("s", images=[("c", tmp_path / "bad.png")])])
    assert not (tmp_path / "r.html").exists()
