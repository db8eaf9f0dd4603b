"""encode, train, sample, evaluate, export and import, one after the other as a user types them, on tiny networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vadit import cli
from vadit.config import DiTConfig, TokenizerConfig
from vadit.config.files import load_run_config
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe
from vadit.sampling.write import noted_sampler

NUM_IMAGES, SIDE = 12, 64


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images in two classes, an untrained tokenizer, its latents and a generator's run on them."""
    folder = tmp_path_factory.mktemp("house")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 70, 90, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = get_recipe("vavae-f16d32-dinov2-debug")
    assert isinstance(config, TokenizerConfig)
    torch.manual_seed(0)
    Autoencoder(config.autoencoder).save_pretrained(folder / "tokenizer")
    assert cli.main(encode(folder)) == 0
    train = ["train", "lightningdit-b-debug", "--run.out", str(folder / "run"), "--data.path", str(folder / "latents")]
    assert cli.main(train) == 0
    return folder


def encode(folder: Path, *settings: str) -> list[str]:
    names = ("--tokenizer", "tokenizer", "--images", "images", "--out", "latents")
    paths = [name if name.startswith("--") else str(folder / name) for name in names]
    return ["encode", *paths, "--image-size", str(SIDE), "--dtype", "fp32", "--num-workers", "1", *settings]


def sample(folder: Path, out: Path, *settings: str) -> list[str]:
    paths = ("--generator", str(folder / "run"), "--tokenizer", str(folder / "tokenizer"), "--out", str(out))
    return ["sample", *paths, "--method", "euler", "--num-steps", "3", "--num-samples", "3", *settings]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """The one sentence that the command ends with."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_encode_leaves_shards_statistics_and_a_second_call_that_does_nothing(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = torch.load(house / "latents" / "latents_stats.pt", weights_only=True)
    assert statistics["mean"].shape == (1, 32, 1, 1)
    before = {path: path.stat().st_mtime_ns for path in (house / "latents").iterdir()}
    capsys.readouterr()
    assert cli.main(encode(house)) == 0
    assert "0 images encoded here" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (house / "latents").iterdir()} == before


def test_sample_takes_statistics_and_flow_from_the_run(house: Path, tmp_path: Path) -> None:
    assert cli.main(sample(house, tmp_path, "--classes", "1", "0")) == 0
    pngs = sorted((tmp_path / "images").glob("*.png"))
    assert len(pngs) == 3
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, SIDE, SIDE, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["labels"].tolist() == [1, 0, 1]


def test_sample_has_the_runs_settings_and_those_that_are_typed(house: Path, tmp_path: Path) -> None:
    common = ["--generator", str(house / "run"), "--tokenizer", str(house / "tokenizer"), "--num-samples", "1"]
    assert cli.main(["sample", *common, "--out", str(tmp_path), "--cfg-scale", "1.5", "--rtol", "0.1"]) == 0
    found = json.loads((tmp_path / "settings.json").read_text())["sampler"]
    run = dataclasses.replace(load_run_config(house / "run").sample, cfg_scale=1.5, rtol=0.1)  # type: ignore[union-attr]
    assert found == json.loads(json.dumps(dataclasses.asdict(run))) and run.method == "dopri5"


def test_a_guide_changes_the_samples_is_named_and_must_fit(
    house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = ["--guide", str(house / "run"), "--guide-ema", "0"]
    said = refusal(capsys, sample(house, tmp_path / "none", *guide, "--cfg-scale", "1"), 2)
    assert "no effect at --cfg-scale 1" in said
    for name, more in (("with", guide), ("without", [])):
        assert cli.main(sample(house, tmp_path / name, *more, "--cfg-scale", "20")) == 0
    ours, theirs = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("with", "without"))
    assert not np.array_equal(ours, theirs)
    assert noted_sampler(str(tmp_path / "with")) == "euler2_autoguided20_random"
    assert noted_sampler(str(tmp_path / "without")) == "euler2_cfg20_random"
    other = get_recipe("lightningdit-b-debug")
    assert isinstance(other, DiTConfig)
    LightningDiT(dataclasses.replace(other.model, num_classes=7)).save_pretrained(tmp_path / "other")
    said = refusal(capsys, sample(house, tmp_path / "x", "--guide", str(tmp_path / "other"), "--cfg-scale", "2"), 2)
    assert "has model.num_classes 7, the generator 10" in said


def test_export_and_import_give_the_same_weights_back(house: Path, tmp_path: Path) -> None:
    folder, file, back = str(tmp_path / "exported"), str(tmp_path / "reference.pt"), str(tmp_path / "back")
    assert cli.main(["export", str(house / "run"), "--out", folder]) == 0
    assert cli.main(["export", folder, "--out", file, "--format", "reference"]) == 0
    assert cli.main(["import", file, "--out", back]) == 0
    first, second = (load_file(Path(path) / "model.safetensors") for path in (folder, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    averaged = load_file(Path(folder) / "model.safetensors")
    assert cli.main(["export", str(house / "run"), "--out", str(tmp_path / "plain"), "--ema", "0"]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert any(not torch.equal(averaged[name], plain[name]) for name in plain)


def test_impossible_requests_are_refused(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--image-size 60" in refusal(capsys, encode(house, "--image-size", "60"), 2)
    assert "label 99" in refusal(capsys, sample(house, tmp_path / "x", "--classes", "99"), 2)
    assert "latents_stats.pt" in refusal(capsys, sample(house, tmp_path / "x", "--latents", str(tmp_path)), 2)
    assert not (tmp_path / "x").exists()
    elsewhere = ["--data.path", str(house / "images"), "--run.out", str(tmp_path / "run")]
    assert str(house / "images") in refusal(capsys, ["train", "lightningdit-b-debug", *elsewhere], 2)
    wrong_kind = ["sample", "--generator", str(house / "run"), "--tokenizer", str(house / "run"), "--out", "x"]
    assert "tokenizer" in refusal(capsys, wrong_kind, 2)
