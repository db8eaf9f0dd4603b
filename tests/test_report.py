"""vadit report: one file that needs no network, its pictures, numbers of runs, and damaged files."""

import base64
import io
import json
import os
import re
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vadit.cli import main
from vadit.config import Config, DiTConfig, RunSpec, StageSpec, TokenizerConfig, vary
from vadit.config.files import save_config
from vadit.images.pixels import image_grid, reconstruction_pairs, write_png
from vadit.recipes import get_recipe
from vadit.recipes.sizes import IMAGENET_IMAGES
from vadit.report.charts import (
    Curve,
    is_worth_drawing,
)
from vadit.report.log import read_log
from vadit.report.page import Row, Section, Tiles, write_report
from vadit.report.runs import (
    REFERENCE_MSE,
    REFERENCE_STEPS,
    is_headline,
    progress,
    read_runs,
    speedup,
)
from vadit.report.sections import quantity_charts, run_sections, write_runs_report
from vadit.report.words import higher_is_better
from vadit.sampling.info import SamplingInfo, save_info


def test_a_report_of_a_long_run_is_one_small_file_without_outside_links(tmp_path: Path) -> None:
    loss = 1 / np.sqrt(np.arange(1, 80_001))
    with (tmp_path / "log.jsonl").open("w") as stream:
        for index, value in enumerate(loss.tolist()):
            line = {"images": index * 64, "step": index, "loss": value, "images_per_s": 100.0 + index % 7}
            stream.write(json.dumps(line | {"grad_norm": float("nan") if index == 1 else 0.5}) + "\n")
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), dtype=np.uint8)  # PNG cannot shrink it: 3 MB
    (tmp_path / "config.json").write_text('{"note": "a < b & c"}')
    runs = read_runs([tmp_path])
    sections = [
        Section("s", [Row("n", [Tiles("&", noise[i : i + 30]) for i in (0, 30)])], quantity_charts(runs)),
        Section("t", table=[("FID", "34.4 dB")], header=("", "with"), settings=[("All", tmp_path / "config.json")]),
    ]
    out = write_report(tmp_path / "sub" / "report.html", "Run <1>", "First & last.", sections)
    assert list(out.parent.iterdir()) == [out] and out.stat().st_size < 2_000_000
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", out.read_text())
    assert set(re.findall(r' src="([^"]*)"', text)) == {"data:image/webp;"}
    assert not re.search(r"https?:|//[a-z]|@import|srcset|url\((?!#)", text)
    drawings = re.findall("<svg.*?</svg>", text)
    assert len(drawings) == 2 and all(ElementTree.fromstring(drawing).tag == "svg" for drawing in drawings)
    # the page's colours, in light and dark; and everything that is referred to is there
    assert "prefers-color-scheme: dark" in text and not re.search(r"(fill|stroke): #(ffffff|000000)", text)
    assert {*re.findall(r'(?:url\(|href=")#(\w+)', text)} <= {*re.findall(r' id="(\w+)"', text)}
    for expected in (
        "Run &lt;1&gt;",
        '<p class="lead">First &amp; last.</p>',
        "34.4 dB",
        '<th scope="col">with</th>',
        "a &lt; b",
    ):
        assert expected in text


def test_small_pictures_are_as_they_were(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    text = write_report(tmp_path / "r.html", "t", "", [Section("s", [Row("", [Tiles("c", images)])])]).read_text()
    files = re.findall('src="data:image/png;base64,([^"]*)" alt=""', text)
    assert [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))).tolist() for file in files] == images.tolist()


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


BATCH = 1024


def headline() -> DiTConfig:
    config = get_recipe("lightningdit-xl-64ep")
    assert isinstance(config, DiTConfig)
    return config


def make_run(
    folder: Path,
    config: Config | None = None,
    steps: tuple[int, ...] = (100, 200, 300, 400),
    fids: tuple[float, ...] = (),
    **values: float,
) -> Path:
    """A run whose velocity MSE is the authors' times 1.1, at 1,000 images/s on 4 devices."""
    folder.mkdir(parents=True)
    if config is not None:
        save_config(config, folder / "config.json")
    with (folder / "log.jsonl").open("w") as stream:
        for step in steps:
            mse = 1.1 * float(np.interp(step, REFERENCE_STEPS, REFERENCE_MSE))
            line = {"images": step * BATCH, "step": step, "loss": mse + 0.5, "mse": mse, "images_per_s": 1000.0,
                    "images_per_s_per_gpu": 250.0, "mfu": 0.4, "epochs": step * BATCH / 1e6,
                    "grad_norm": 1 / step, **values}  # fmt: skip
            stream.write(json.dumps(line) + "\n")
    (folder / "evaluations").mkdir()
    with (folder / "evaluations.jsonl").open("w") as stream:
        for number, fid in enumerate(fids):
            grid = f"evaluations/{number}.png"
            Image.new("RGB", (64, 32), (40 * number, 90, 200)).save(folder / grid)
            line = {"images": (number + 1) * 1000, "fid1k_euler50": fid, "seconds": 3.0, "grid": grid}
            stream.write(json.dumps(line) + "\n")
    return folder


def test_the_projection_of_a_run_is_arithmetic(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", headline())
    (run,) = read_runs([folder])
    now = progress(run)
    assert (now.images, now.devices, now.images_per_s) == (400 * BATCH, 4, 1000.0)
    assert now.target == pytest.approx(64_000_000)  # 64 epochs of the million images that the log's epochs mean
    assert now.epochs == pytest.approx(0.4096)
    assert now.hours_done == pytest.approx(400 * BATCH / 1000 / 3600)
    assert now.hours_left == pytest.approx((64_000_000 - 400 * BATCH) / 1000 / 3600)
    os.utime(folder / "log.jsonl", (1e9, 1e9))
    sections = {section.title: section for section in run_sections([run])}
    table = {row[0]: row[1] for row in sections["Progress"].table}
    assert table["time to 64 epochs"] == "17.7 h"
    assert table["device time to 64 epochs"] == "71.1 h on 4"  # 64e6 images at 1,000/s last 17.8 h
    assert (table["images"], table["model FLOP utilisation"]) == ("409,600", "40.0%")
    assert table["64 epochs at"] == f"{datetime.fromtimestamp(1e9 + now.hours_left * 3600):%Y-%m-%d %H:%M}"


def test_nothing_is_projected_for_a_run_that_is_over(tmp_path: Path) -> None:
    config = headline()
    short = vary(config, run={"total_images": 400 * BATCH})
    for name, settings, expected in (("over", short, "not planned: the run is over"), ("going", config, r"[-\d: ]+")):
        section = run_sections(read_runs([make_run(tmp_path / name, settings)]))[0]
        assert re.fullmatch(expected, section.table[-1][1])
        names = [series.name for chart in section.charts for series in chart.series]
        assert names == ["going", "going, projected"] * (name == "going")  # a straight line alone says nothing


def test_the_slow_beginning_counts_as_time_but_not_for_the_future(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", headline())
    lines = [{"images": i * 1000, "images_per_s": 10.0 if i <= 60 else 100.0} for i in range(1, 101)]
    lines[40]["images_per_s"] = float("nan")  # its time goes with the next
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    now = progress(read_runs([folder])[0])
    assert now is not None and now.devices is None
    assert now.images_per_s == 100
    assert now.hours_done == pytest.approx((60 * 1000 / 10 + 40 * 1000 / 100) / 3600)
    assert now.target == 64 * IMAGENET_IMAGES  # no epochs in the log


def test_losses_stand_beside_the_authors_log_where_the_recipe_is_theirs(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run", headline())])
    loss = next(section for section in run_sections([run]) if section.title == "Loss")
    assert loss.table[1:] == [("200", "0.5402", "0.5942 (+10.0%)"), ("300", "0.4637", "0.5101 (+10.0%)")]
    mse = next(chart for chart in loss.charts if chart.title == "Velocity MSE")
    authors = next(series for series in mse.series if not series.is_line)
    assert authors.curve.x.tolist() == [step * BATCH for step in REFERENCE_STEPS[:4]]
    assert authors.curve.y.tolist() == list(REFERENCE_MSE[:4])
    assert (np.diff(REFERENCE_MSE) < 0).all() and REFERENCE_STEPS[-1] * BATCH == headline().run.total_images

    (changed,) = read_runs([make_run(tmp_path / "changed", vary(headline(), optimizer={"lr": 1e-4}))])
    loss = next(section for section in run_sections([changed]) if section.title == "Loss")
    assert not loss.table and not any(not series.is_line for chart in loss.charts for series in chart.series)


def test_what_counts_as_the_authors_recipe() -> None:
    config = headline()
    assert is_headline(config)
    assert is_headline(get_recipe("lightningdit-xl-800ep"))
    assert is_headline(vary(config, engine={"zero_stage": 2}))
    for change in (
        {"model": {"qk_norm": True}}, {"flow": {"direction_loss": False}}, {"run": {"batch_size": 512}},
        {"repa": {"weight": 0.5}}, {"mask": {"kind": "mdt"}}, {"data": {"multiplier": 2.0}},
    ):  # fmt: skip
        assert not is_headline(vary(config, **change)), change
    assert not is_headline(TokenizerConfig())
    assert not is_headline(None)


def test_the_stages_of_a_tokenizer_are_one_run(tmp_path: Path) -> None:
    run_spec = RunSpec(total_images=6000, batch_size=BATCH)
    config, folder = TokenizerConfig(stages=(StageSpec(4000), StageSpec(2000)), run=run_spec), tmp_path / "tokenizer"
    save_config(config, folder / "config.json")
    for stage, rates in ((1, (100.0, 100.0, 100.0, 100.0)), (2, (50.0,))):
        (folder / f"stage-{stage}").mkdir()
        lines = [{"images": 1000 * (i + 1), "kl": 1.0, "images_per_s": rate} for i, rate in enumerate(rates)]
        (folder / f"stage-{stage}" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([folder])
    assert run.kind == "tokenizer"
    assert run.log.curves["kl"].x.tolist() == [1000, 2000, 3000, 4000, 5000]
    now = progress(run)
    assert now is not None and now.target == 6000
    assert now.hours_done * 3600 == pytest.approx(4000 / 100 + 1000 / 50)
    assert now.hours_left * 3600 == pytest.approx(10)  # at the median of the last five points


def test_the_speed_up_at_an_equal_value() -> None:
    fast = Curve(np.array([1e6, 2e6, 3e6]), np.array([50.0, 30.0, 20.0]))
    slow = Curve(np.array([1e6, 2e6, 3e6, 6e6]), np.array([90.0, 70.0, 60.0, 40.0]))
    needs = [(1.5e6, False), (6e6, False)]  # half way from 50 to 30, and the last point
    assert speedup("fid1k", [fast, slow]) == (40, needs)
    assert speedup("psnr", [Curve(fast.x, -fast.y), Curve(slow.x, -slow.y)]) == (-40, needs)
    ahead = Curve(np.array([1e6]), np.array([30.0]))
    assert speedup("fid1k", [ahead, slow]) == (40, [(1e6, True), (6e6, False)])
    gaps = Curve(np.array([1e6, 2e6, 3e6]), np.array([50.0, np.nan, 20.0]))
    assert speedup("fid1k", [gaps, slow]) == (40, [(pytest.approx(1e6 + 2e6 / 3), False), (6e6, False)])
    assert speedup("fid1k", [fast]) is None
    assert speedup("fid1k", [fast, Curve(np.array([1.0]), np.array([np.nan]))]) is None
    assert all(map(higher_is_better, ("is50k_euler249", "precision50k_dopri5", "recall1k", "psnr", "ssim")))
    assert not any(map(higher_is_better, ("fid50k", "sfid50k", "kid1k", "fd_dinov2_50k", "rfid50k", "lpips")))


def test_several_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    base = headline()
    first = make_run(tmp_path / "with", base, fids=(60.0, 30.0))
    second = make_run(tmp_path / "without", vary(base, optimizer={"lr": 1e-4}), fids=(80.0, 60.0, 45.0, 30.0))
    for folder, rfid, fid in ((first, 0.28, 8.2), (second, 0.26, 10.9)):
        scores = {"kind": "samples", "metrics": {"fid10k_dopri5_random": fid}, "spread": {"fid10k_dopri5_random": 0.1}}
        (folder / "metrics.json").write_text(json.dumps(scores))
        (folder / "metrics-tokenizer.json").write_text(json.dumps({"kind": "tokenizer", "metrics": {"rfid50k": rfid}}))
    runs = read_runs([first, second])
    sections = {section.title: section for section in run_sections(runs)}
    training = sections["Metrics during training"]
    fid = "FID\n1,000 samples, 50 euler steps, no guidance"
    assert training.table == [
        (fid, "30", "with", "2000", "2.00x sooner"),
        (fid, "30", "without", "4000", "-"),
    ]
    (chart,) = training.charts
    assert chart.level == 30 and [series.color for series in chart.series] == [0, 1]
    quality = list(sections["Quality"].table)
    place = quality.index(("10,000 samples, dopri5 (adaptive), random classes, no guidance",))
    assert quality[place + 1] == ("FID\nlower is better", "8.2 ± 0.1", "10.9 ± 0.1")
    (frontier,) = sections["Frontier of tokenizers"].charts
    points = {series.name: (series.curve.x.tolist(), series.curve.y.tolist()) for series in frontier.series}
    assert points["with"] == ([0.28], [8.2]) and points["without"] == ([0.26], [10.9])
    published = next(values for name, values in points.items() if "published" in name)
    assert (published[0][5], published[1][5]) == (0.28, 8.22)  # f16d32 with DINOv2, XL
    assert frontier.y_label == "fid10k_dopri5_random"
    rest = sections["All that was logged, and settings"]
    assert list(rest.table)[-1] == ("optimizer.lr", "0.0002", "0.0001")
    assert len(sections["Samples over training"].gallery) == 2 + 4

    assert main(["report", str(first), str(second), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert page.count("<svg") == 6  # loss, MSE, progress, FID, frontier, and the gradient norm's small one
    assert page.count('class="legend"') == 5 + 1  # of each wide chart, and of the small ones


def blobs(count: int, shade: int, side: int = 32) -> np.ndarray:
    return np.full((count, side, side, 3), shade, np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]


def make_project(folder: Path) -> Path:
    """What training, sampling and evaluation leave in a folder, with pictures of one shade by class and origin."""
    for label, name in enumerate(("birds & bees", "cats")):
        (folder / "photos" / name).mkdir(parents=True)
        for index, image in enumerate(blobs(6, 20 + 40 * label)):
            Image.fromarray(image).save(folder / "photos" / name / f"{index}.png")
    config = vary(headline(), run={"total_images": 400 * BATCH})
    generator = make_run(folder / "generator", config, steps=(100, 200, 400), epochs=8.0)
    config = vary(get_recipe("vae-f16d32-50ep"), data={"path": str(folder / "photos")})
    tokenizer = make_run(folder / "tokenizer", config, steps=(2,), kl=1.0)
    for run, picture in (
        (generator, image_grid(blobs(10, 150))),
        (tokenizer, reconstruction_pairs(blobs(4, 60), blobs(4, 90))),
    ):
        for images in (1024, 4096):
            write_png(run / "evaluations" / f"{images}.png", picture)
        lines = [{"images": images, "grid": f"evaluations/{images}.png"} for images in (1024, 4096)]
        (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_info(SamplingInfo(classes=["birds & bees", "cats"], tokenizer=str(tokenizer)), generator)
    samples = folder / "samples" / "euler49"
    labels = np.arange(20) % 2
    for index, label in enumerate(labels.tolist()):
        write_png(samples / "images" / f"{index:06d}.png", Image.fromarray(blobs(1, 100 + 100 * label)[0]))
    np.savez(samples / "samples.npz", labels=labels)
    found = {"fid64_euler49_cfg2_balanced": 44.1, "precision64_euler49_cfg2_balanced": 0.5}
    inputs = {"reference": "refs/mine.npz", "num_references": 52, "inception_published": False}
    (generator / "metrics.json").write_text(json.dumps({"kind": "samples", "metrics": found, "inputs": inputs}))
    return folder


def test_the_page_of_a_project_begins_with_its_pictures(tmp_path: Path) -> None:
    project = make_project(tmp_path / "mine")
    sections = run_sections(read_runs([project]))
    assert [section.title for section in sections] == [
        "Samples", "Samples over training", "Reconstructions", "Reconstructions over training", "Generator: Quality",
        "Generator: Progress", "Generator: Loss", "Generator: All that was logged, and settings", "Tokenizer: Progress",
        "Tokenizer: All that was logged, and settings",
    ]  # fmt: skip
    by_class, over_training, pairs, quality = (sections[number] for number in (0, 1, 2, 4))
    assert [row.title for row in by_class.gallery] == ["birds & bees", "cats"]
    for label, row in enumerate(by_class.gallery):
        real, samples = row.tiles
        assert real.images[:, 0, 0, 0].tolist() == [20 + 40 * label + index for index in (0, 2, 3, 5)]  # of its class
        assert samples.images[:, 0, 0, 0].tolist() == [100 + 100 * label] * 8
    assert [row.title for row in over_training.gallery] == ["1,024 images\n1 s", "4,096 images\n4 s"]
    assert over_training.gallery[0].tiles[0].images[:, 0, 0, 0].tolist() == list(range(150, 158))
    assert pairs.gallery[0].tiles[0].images[:, [0, -1], 0, 0].tolist() == [[60 + n, 90 + n] for n in range(4)]
    assert list(quality.table) == [
        ("64 samples, 49 euler steps, guidance 2, balanced classes",),
        ("FID\nlower is better", "44.1\nagainst your 52 images (mine.npz)\n"
         "too few to compare; not the published Inception weights"),
        ("Precision\nhigher is better", "0.5\nagainst your 52 images (mine.npz)\nnot the published Inception weights"),
    ]  # fmt: skip
    assert all(is_worth_drawing(chart) for section in sections for chart in section.charts)

    assert main(["report", str(project)]) == 0
    page = (project / "report.html").read_text()
    assert "<title>mine</title>" in page and "LightningDiT" in page.split("<nav>")[0]
    assert page.count("<img") == page.count("<img src=") == 2 * (4 + 8) + 2 * 8 + 3 * 4
    assert 'aria-label="birds &amp; bees: 8 samples"' in page and "4 images, each above its reconstruction" in page
    assert page.count('class="warn">too few to compare; not the published') == 1 and "0.0 h" not in page
    (project / "photos").rename(tmp_path / "elsewhere")
    (project / "samples/euler49/images/000004.png").unlink()
    assert main(["report", str(project)]) == 0  # of what is left
    assert "could not be read" in (project / "report.html").read_text()


def test_the_frontier_has_one_protocol(tmp_path: Path) -> None:
    found = {
        "a": {"fid50k_euler249_cfg10_random": 2.1, "fid50k_euler249_random": 5.1},
        "b": {"fid50k_euler249_cfg10_random": 2.5, "fid50k_euler249_random": 6.0},
        "c": {"fid50k_euler249_cfg10_random": 2.6},
        "d": {"fid50k_euler249_random": 9.0},
    }
    folders = []
    for name, metrics in found.items():
        folders.append(make_run(tmp_path / name, headline(), steps=()))
        (folders[-1] / "metrics.json").write_text(json.dumps({"kind": "samples", "metrics": metrics}))
        if name != "d":
            rfid = json.dumps({"kind": "tokenizer", "metrics": {"rfid50k": 0.3, "psnr": 28.0}})
            (folders[-1] / "metrics-tokenizer.json").write_text(rfid)

    def drawn(*which: int) -> tuple[str, dict[str, list[float]], str]:
        runs = read_runs([folders[index] for index in which])
        section = next(section for section in run_sections(runs) if section.title == "Frontier of tokenizers")
        chart = section.charts[0]
        return chart.y_label, {each.name: each.curve.y.tolist() for each in chart.series}, " ".join(section.notes)

    assert drawn(0, 1) == ("fid50k_euler249_random", {"a": [5.1], "b": [6.0]}, "")
    label, points, note = drawn(0, 2, 3)
    assert (label, points) == ("fid50k_euler249_cfg10_random", {"a": [2.1], "c": [2.6]})
    assert note.endswith(": d.")
    with pytest.raises(StopIteration):
        drawn(3)


def test_runs_of_different_kinds_are_told_apart(tmp_path: Path) -> None:
    generator = make_run(tmp_path / "a" / "run", headline())
    tokenizer = make_run(tmp_path / "b" / "run", TokenizerConfig(), kl=0.5)
    sections = run_sections(read_runs([generator, tokenizer]))
    titles = [section.title for section in sections]
    assert "Generator: Progress" in titles and "Tokenizer: Progress" in titles
    for section in sections:
        for chart in section.charts:
            assert len({series.name.split(",")[0] for series in chart.series} - {"the authors' log"}) <= 1
    assert {chart.series[0].name for section in sections for chart in section.charts} == {"a/run", "b/run"}


def test_damaged_files_are_left_out_and_reported(tmp_path: Path, capsys) -> None:
    folder = make_run(tmp_path / "run", headline(), fids=(60.0, 30.0, 20.0))
    with (folder / "log.jsonl").open("ab") as stream:
        bad = (b'{"images": 1', b"[1, 2]", b"null", b'{"images": "many"}', b'{"images": true}', b'{"images": NaN}',
               b'{"images": -4}', b"\xff\xfe\x00", b"[" * 100_000)  # fmt: skip
        bad += (b"", b'{"images": 500000, "mse": "x"}', b'{"images": 600000, "loss": %s}' % (b"9" * 400))
        stream.write(b"\n".join(bad))
    with (folder / "evaluations.jsonl").open("a") as stream:
        stream.write('{"images": 9000, "grid": "../secret.png"}\n{"images": 9500, "grid": 7}\n')
        stream.write('{"images": 9600, "fid1k_x": 3, "inputs": 7}\n{"ima')
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    (folder / "evaluations" / "1.png").unlink()
    (folder / "evaluations" / "2.png").write_bytes(b"no picture")
    (folder / "metrics.json").write_text("[]")
    (folder / "metrics-2.json").write_text('{"kind": "samples", "metrics": {"fid1k": 3, "bad": NaN, "worse": "x"}}')
    odd = {"kind": "", "metrics": {"psnr": 3, "_": 2, "fid1_-": 1}, "inputs": {"num_images": "x", "reference": [3]}}
    (folder / "metrics-3.json").write_text(json.dumps(odd))
    assert main(["report", str(folder)]) == 0
    notes = capsys.readouterr().out
    for expected in ("damaged lines of log.jsonl left out: 10", "evaluations.jsonl left out: 1", "metrics.json is not"):
        assert expected in notes
    text = (folder / "report.html").read_text()
    assert "log.jsonl left out: 10" in text and "2 pictures are gone or damaged" in text
    assert [path.name for _, path in read_runs([folder])[0].grids] == ["0.png", "1.png", "2.png"]
    log = read_log(folder / "log.jsonl")
    assert log.curves["mse"].x.tolist() == [100 * BATCH, 200 * BATCH, 300 * BATCH, 400 * BATCH]
    assert read_runs([folder])[0].scores[0].metrics == {"fid1k": 3.0}


@pytest.mark.parametrize("config", ["", "{", '{"kind": "dit", "model": {"colour": 3}}', "[]", '{"kind": 5}', None])
def test_a_config_of_another_version_does_not_stop_the_report(tmp_path: Path, config: str | None) -> None:
    folder = make_run(tmp_path / "run")
    if config is not None:
        (folder / "config.json").write_text(config)
    notes = write_runs_report([folder], tmp_path / "report.html")
    assert "config.json could not be read" in notes[0]
    assert read_runs([folder])[0].kind == "dit"  # by its config or by what it logged


def test_runs_with_nothing_to_show(tmp_path: Path, capsys) -> None:
    full = make_run(tmp_path / "full", headline())
    empty = make_run(tmp_path / "empty", headline(), steps=())
    (tmp_path / "bare").mkdir()
    save_config(headline(), tmp_path / "bare" / "config.json")
    (tmp_path / "nothing").mkdir()
    for arguments, message in (
        ([tmp_path / "absent"], "absent is no run folder"),
        ([tmp_path / "nothing"], "holds neither config.json nor log.jsonl"),
        ([empty], "its log.jsonl holds no points yet"),
        ([tmp_path / "bare"], "there is no log.jsonl yet"),
        ([full, tmp_path / "full" / ".." / "full"], "named twice"),
        ([full, "--out", tmp_path], "it is a folder"),
    ):
        assert main(["report", *map(str, arguments)]) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (full / "report.html").exists() and not (empty / "report.html").exists()
    # beside a run that has points, an empty one is a note
    notes = write_runs_report([full, empty, tmp_path / "bare"], tmp_path / "r.html")
    assert [note.split(":")[0] for note in notes] == ["empty", "bare"]
    assert "its log.jsonl holds no points yet" in (tmp_path / "r.html").read_text()
