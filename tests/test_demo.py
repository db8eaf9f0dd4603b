"""The demo end to end at a few steps: it goes on after a stop, writes what it promises, and claims nothing unproven."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vadit.demo import compare, run
from vadit.demo.data import prepare
from vadit.demo.options import DemoOptions
from vadit.runtime.errors import UsageError
from vadit.train import dit

TINY = run.Sizes(foundation=2, judge=2, tokenizer=4, generator=4, samples=64)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(run, "UNIFORMITY_VECTORS", 100)


def test_goes_on_after_a_stop(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = DemoOptions(out=str(tmp_path / "demo"), quick=True)
    out = tmp_path / "demo"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dit, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run.run_demo(options)
    kept = [out / "networks/foundation.safetensors", out / "latents/index.json", out / "tokenizer/log.jsonl"]
    times = [path.stat().st_mtime_ns for path in kept]
    assert not (out / "metrics.json").exists()

    run.run_demo(options)
    assert [path.stat().st_mtime_ns for path in kept] == times, "a finished stage was done again"
    metrics = json.loads((out / "metrics.json").read_text())
    samples = {name: scores for name, scores in metrics.items() if name.startswith("samples_")}
    assert len(samples) == 2 and all(0 <= scores["agreement"] <= 1 for scores in samples.values())
    assert metrics["tokenizer"]["psnr"] > 0
    for name in ("samples.png", "samples-plain.png", "reconstructions.png", "report.html"):
        assert (out / name).stat().st_size > 500, name
    assert list((out / "tokenizer/tensorboard").iterdir()) and list((out / "generator/tensorboard").iterdir())
    assert "data:image/png" in (out / "report.html").read_text()
    assert len((out / "generator/log.jsonl").read_text().splitlines()) == 1


def test_another_demo_in_the_same_folder_is_refused(tiny: None, tmp_path: Path) -> None:
    run.Demo(DemoOptions(out=str(tmp_path), quick=True))
    with pytest.raises(UsageError, match="another --out"):
        run.Demo(DemoOptions(out=str(tmp_path), quick=False))


def test_comparison_runs_and_resumes(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = DemoOptions(out=str(tmp_path), quick=True, compare=True, seeds=2)
    run.run_demo(options)
    rows = json.loads((tmp_path / "comparison.json").read_text())["quantities"]
    assert {"tokenizer psnr", "tokenizer gini", "generator loss", "samples frechet"} <= rows.keys()
    for row in rows.values():
        assert len(row["values"]["plain"]) == len(row["values"]["vf"]) == 2
        assert row["p_holm"] >= 0.05 or row["verdict"] != "not told apart by these seeds"
    plain, vf = (json.loads((tmp_path / f"tokenizer-{name}-0/config.json").read_text()) for name in ("plain", "vf"))
    assert plain["loss"].pop("vf_weight") == 0.0 and vf["loss"].pop("vf_weight") > 0
    for config in (plain, vf):
        config["run"].pop("out")
    assert plain == vf, "the two must be equal in all else"
    monkeypatch.setattr(run.Demo, "tokenizer", lambda *_, **__: pytest.fail("a finished seed was trained again"))
    run.run_demo(options)


def test_a_comparison_needs_a_spread(tiny: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seeds"):
        run.run_demo(DemoOptions(out=str(tmp_path), quick=True, compare=True, seeds=1))


def test_no_winner_without_evidence() -> None:
    assert compare.verdict({"plain": (1.0, 0.1), "vf": (1.3, 0.2)}, p=0.2) == "not told apart by these seeds"
    assert compare.verdict({"plain": (1.0, 0.1), "vf": (3.0, 0.1)}, p=0.01) == "higher with VF"
    assert compare.verdict({"plain": (3.0, 0.1), "vf": (1.0, 0.1)}, p=0.01) == "lower with VF"


def test_holm_correction() -> None:
    # Sorted 0.01, 0.02, 0.04: times 3, 2, 1, never falling.
    assert compare.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_pictures(kind: str, tmp_path: Path) -> None:
    data = prepare(tmp_path / kind, kind)  # type: ignore[arg-type]
    images = np.concatenate([data.train_images, data.held_out_images])
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    assert len(list((tmp_path / kind / "train").rglob("*.png"))) == len(data.train_images)
    assert set(data.train_labels) == set(data.held_out_labels) == set(range(10))
    assert images.std() > 20, "pictures, not blanks"
