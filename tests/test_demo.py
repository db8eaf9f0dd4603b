"""The demo end to end at a few steps: it goes on after a stop, writes what it promises, and claims nothing unproven."""

import json
from pathlib import Path

import numpy as np
import pytest

from vadit.demo import run
from vadit.demo.data import prepare
from vadit.runtime.errors import UsageError
from vadit.train import dit

TINY = run.Sizes(foundation=2, judge=2, tokenizer=4, generator=4, samples=64)


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(run, "UNIFORMITY_VECTORS", 100)


def test_goes_on_after_a_stop(tiny: None, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "demo"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dit, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            run.run_demo(out, "digits", quick=True, seed=3)
    kept = [out / "networks/foundation.safetensors", out / "latents/index.json", out / "tokenizer/log.jsonl"]
    times = [path.stat().st_mtime_ns for path in kept]
    assert not (out / "metrics.json").exists()

    run.run_demo(out, "digits", quick=True, seed=3)
    assert [path.stat().st_mtime_ns for path in kept] == times, "a finished stage was done again"
    metrics = json.loads((out / "metrics.json").read_text())
    samples = {name: scores for name, scores in metrics.items() if name.startswith("samples_")}
    assert len(samples) == 2 and all(0 <= scores["agreement"] <= 1 for scores in samples.values())
    assert metrics["tokenizer"]["psnr"] > 0
    for stage in ("tokenizer", "generator"):
        assert json.loads((out / stage / "config.json").read_text())["run"]["seed"] == metrics["seed"] == 3
    for name in ("samples.png", "samples-plain.png", "reconstructions.png", "report.html"):
        assert (out / name).stat().st_size > 500, name
    assert list((out / "tokenizer/tensorboard").iterdir()) and list((out / "generator/tensorboard").iterdir())
    assert "data:image/png" in (out / "report.html").read_text()
    assert len((out / "generator/log.jsonl").read_text().splitlines()) == 1
    with pytest.raises(UsageError, match="quick True, this command says False; use another --out"):
        run.run_demo(out, "digits", quick=False, seed=3)


@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_pictures(kind: str, tmp_path: Path) -> None:
    data = prepare(tmp_path / kind, kind)  # type: ignore[arg-type]
    images = np.concatenate([data.train_images, data.held_out_images])
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    assert len(list((tmp_path / kind / "train").rglob("*.png"))) == len(data.train_images)
    assert set(data.train_labels) == set(data.held_out_labels) == set(range(10))
    assert images.std() > 20, "pictures, not blanks"
