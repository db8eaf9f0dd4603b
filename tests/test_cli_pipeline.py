"""encode, train, sample, export and import as a user types them, on tiny networks, and what bad input makes of them.

A limit on the size of files (RLIMIT_FSIZE) stands for the full disk: the writes themselves fail, in whatever library.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import room_for
from PIL import Image
from safetensors.torch import load_file

from vadit import cli
from vadit.config.files import load_config, load_run_config
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.models.pretrained import write_safetensors
from vadit.recipes import get_recipe
from vadit.runtime.errors import UsageError
from vadit.runtime.safetensors_file import load_tensors
from vadit.sampling.write import noted_sampler

NUM_IMAGES, SIDE = 12, 64
DEBUG = ["train", "lightningdit-b-debug", "--model.num-classes", "10"]  # more than the data have


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two classes, an untrained tokenizer, its latents, a run of a generator on them and its exports."""
    folder = tmp_path_factory.mktemp("house")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 70, 90, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = folder / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = get_recipe("vavae-f16d32-dinov2-debug")
    torch.manual_seed(0)
    Autoencoder(config.autoencoder).save_pretrained(folder / "tokenizer")
    assert cli.main(encode(folder)) == 0
    assert cli.main([*DEBUG, "--run.out", str(folder / "run"), "--data.path", str(folder / "latents")]) == 0
    assert cli.main(["export", str(folder / "run"), "--out", str(folder / "exported")]) == 0
    reference = ["--format", "reference", "--out", str(folder / "reference.pt")]
    assert cli.main(["export", str(folder / "exported"), *reference]) == 0
    return folder


def encode(folder: Path, *settings: str) -> list[str]:
    names = ("--tokenizer", "tokenizer", "--images", "images", "--out", "latents")
    paths = [name if name.startswith("--") else str(folder / name) for name in names]
    return ["encode", *paths, "--image-size", str(SIDE), "--dtype", "fp32", "--num-workers", "1", *settings]


def sample(folder: Path, out: Path, *settings: str) -> list[str]:
    drawing = ["--method", "euler", "--num-steps", "3", "--num-samples", "3"]
    return ["sample", str(folder / "run"), "--out", str(out), *drawing, *settings]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refusal(capsys, arguments: list[str], code: int) -> str:
    """The one sentence that the command ends with."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    text = capsys.readouterr().err
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in text, text
    return last


def test_encode_leaves_shards_statistics_and_a_second_call_that_does_nothing(house: Path, capsys) -> None:
    statistics = torch.load(house / "latents" / "latents_stats.pt", weights_only=True)
    assert statistics["mean"].shape == (1, 32, 1, 1)
    before = {path: path.stat().st_mtime_ns for path in (house / "latents").iterdir()}
    capsys.readouterr()
    assert cli.main(encode(house)) == 0
    assert "0 images encoded here" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (house / "latents").iterdir()} == before
    index = house / "latents" / "index.json"
    whole = json.loads(index.read_text())
    assert whole["tokenizer"] == "../tokenizer" and whole["classes"] == ["a", "b"]
    index.write_text(json.dumps({name: value for name, value in whole.items() if name != "tokenizer"}))  # of old
    assert cli.main(encode(house)) == 0 and json.loads(index.read_text()) == whole
    after = {path: path.stat().st_mtime_ns for path in (house / "latents").iterdir() if path != index}
    assert after == {path: time for path, time in before.items() if path != index}


def test_sample_takes_statistics_and_flow_from_the_run(house: Path, tmp_path: Path) -> None:
    assert cli.main(sample(house, tmp_path, "--classes", "1", "0")) == 0
    pngs = sorted((tmp_path / "images").glob("*.png"))
    assert len(pngs) == 3
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, SIDE, SIDE, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["labels"].tolist() == [1, 0, 1]


def test_sample_has_the_runs_settings_and_those_that_are_typed(house: Path, tmp_path: Path) -> None:
    common = [str(house / "run"), "--tokenizer", str(house / "tokenizer"), "--num-samples", "1"]
    assert cli.main(["sample", *common, "--out", str(tmp_path), "--cfg-scale", "1.5", "--rtol", "0.1"]) == 0
    found = json.loads((tmp_path / "settings.json").read_text())["sampler"]
    run = dataclasses.replace(load_run_config(house / "run").sample, cfg_scale=1.5, rtol=0.1)  # type: ignore[union-attr]
    assert found == json.loads(json.dumps(dataclasses.asdict(run))) and run.method == "dopri5"


def test_what_a_run_did_not_train_is_said_and_not_sampled(house: Path, tmp_path: Path, capsys) -> None:
    run = ["--run.out", str(tmp_path / "run"), "--data.path", str(house / "latents"), "--sample.cfg-scale", "2"]
    averages = ["--engine.ema-decays", "0.9", "0.5", "0.001", "--engine.no-ema-warmup"]
    assert cli.main([*DEBUG, *run, *averages, "--model.class-dropout", "0"]) == 0
    said = capsys.readouterr().err
    assert len(re.findall(r"train .*: \d+ of \d+.*, loss \d\.\d+", said)) >= 2  # a line at each log point
    assert "holds samples of 2 of the 10 classes" in said and "model.class_dropout 0" in said
    common = ["sample", "--tokenizer", str(house / "tokenizer"), "--num-samples", "12", "--num-steps", "2"]
    common += ["--method", "euler", "--latents", str(house / "latents")]
    message = refusal(capsys, [*common, str(tmp_path / "run"), "--out", str(tmp_path / "none")], 2)
    assert "--cfg-scale is 2" in message and "model.class_dropout 0" in message and not (tmp_path / "none").exists()
    for ema, share in (("0.9", "81%"), ("0.5", "25%"), ("0.001", ""), ("0", "")):
        assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / ema), "--ema", ema]) == 0
        said = [capsys.readouterr().err]
        for source in (["run", "--ema", ema], [ema]) if ema == "0.9" else ():
            settings = [*common, str(tmp_path / source[0]), *source[1:], "--cfg-scale", "1"]
            assert cli.main([*settings, "--out", str(tmp_path / f"of-{source[0]}")]) == 0
            said.append(capsys.readouterr().err)
            assert "among the 2 trained classes of 10" in said[-1]
            with np.load(tmp_path / f"of-{source[0]}" / "samples.npz") as archive:
                assert set(archive["labels"].tolist()) == {0, 1}
        if ema == "0.9":
            assert noted_sampler(tmp_path / "of-0.9") == "euler1_random"
            said.append(capsys.readouterr().err)
        for text in said:
            assert (f"{share} of the average with decay {ema} are still" in text) == bool(share)
            assert ("--ema 0" in text) == bool(share)
    assert cli.main([*common, str(house / "run"), "--out", str(tmp_path / "warm"), "--classes", "1", "7"]) == 0
    said = capsys.readouterr().err
    assert "5% of the average with decay 0.9999" in said and "class 7 of --classes was not trained" in said


@pytest.fixture
def mine(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, moved from where it was made, with an average more, and another folder to work in."""
    made = tmp_path / "made"
    for name in ("tokenizer", "latents"):
        shutil.copytree(house / name, made / name)
    index = made / "latents" / "index.json"
    index.write_text(index.read_text().replace('"a",', '"Blue jay, young",').replace('"b"', '"caf\\u00e9"'))
    train = [*DEBUG, "--run.out", str(made / "generator"), "--data.path", str(made / "latents")]
    assert (
        cli.main(
            [*train, "--engine.no-ema-warmup", "--engine.ema-decays", "0.9", "0.5", "--sample.timestep-shift", "0.3"]
        )
        == 0
    )
    made.rename(tmp_path / "mine")
    (tmp_path / "mine" / "latents").rename(tmp_path / "gone")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "mine"


def test_a_folder_says_all_that_its_samples_need(mine: Path, capsys) -> None:
    common = ["--num-samples", "3", "--num-steps", "2", "--method", "euler", "--cfg-scale", "2"]
    made = {}
    for folder, ema in (("../mine", "0.9"), ("../exported", "0.9"), ("../mine", "0.5")):
        if folder == "../exported":
            assert cli.main(["export", "../mine/generator", "--out", "../exported"]) == 0
        given = ["--ema", "0.5"] * (ema == "0.5")
        names = ["--classes", "cafe\u0301", "blue  JAY, Young,1"]
        capsys.readouterr()
        assert cli.main(["sample", folder, *common, *names, *given]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "num_steps 2, cfg_scale 2.0, classes café (1), Blue jay, young (0), café (1) (flag)" in said
        assert "timestep_shift 0.3 (recipe's)" in said and "seed 0 (default)" in said and "labels" not in said
        found = (mine.parent / folder.removeprefix("../") / "samples").glob("euler1_shift0.3_cfg2_listed-*/samples.npz")
        with np.load(max(found, key=lambda path: path.stat().st_mtime_ns)) as archive:
            made[folder, ema] = archive["arr_0"]
            assert archive["labels"].tolist() == [1, 0, 1]
    images = list(made.values())
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert len(list((mine / "samples").iterdir())) == 2  # other weights, another folder
    assert [*mine.parent.joinpath("elsewhere").iterdir()] == []
    (mine / "tokenizer").rename(mine / "moved")
    said = refusal(capsys, ["sample", "../exported", *common], 2)
    assert str(mine / "tokenizer") in said and "is not there; set --tokenizer" in said
    again = ["sample", "../exported", *common, "--classes", "1", "0", "1", "--tokenizer"]
    assert cli.main([*again, "../mine/moved"]) == 0
    (mine.parent / "tokenizer").symlink_to(mine / "moved")
    assert cli.main(["sample", "../exported", *common, "--classes", "1", "0", "1"]) == 0
    (mine.parent / "tokenizer").unlink()
    assert len(list((mine.parent / "exported" / "samples").iterdir())) == 1  # the very same weights and settings
    torch.manual_seed(1)
    Autoencoder(get_recipe("vavae-f16d32-dinov2-debug").autoencoder).save_pretrained(mine / "tokenizer")
    said = refusal(capsys, ["sample", "../mine", *common], 2)
    assert "has other weights (" in said and "--no-check-tokenizer" in said
    assert cli.main(["sample", "../mine", *common, "--no-check-tokenizer"]) == 0
    for folder in ("exported", "mine/generator"):  # of before the file
        (mine.parent / folder / "sampling.json").unlink()
        given, flags = ["--tokenizer", "../mine/moved"], ["--latents", "../gone"]
        old = ["sample", f"../{folder}", *common]
        assert "set --tokenizer" in refusal(capsys, old, 2)
        assert "latents are not known from it; set --latents" in refusal(capsys, [*old, *given], 2)
    assert cli.main([*old, *given, *flags, "--timestep-shift", "0.3"]) == 0
    shutil.rmtree(mine / "generator" / "checkpoints")
    assert "has no checkpoint yet; train it first" in refusal(capsys, ["sample", "../mine", *common], 2)


def test_latents_of_another_tokenizer_do_not_continue_a_run(house: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(house / "run", tmp_path / "run")
    train = [*DEBUG, "--run.out", str(tmp_path / "run"), "--data.path"]
    torch.manual_seed(1)
    Autoencoder(get_recipe("vavae-f16d32-dinov2-debug").autoencoder).save_pretrained(tmp_path / "tokenizer")
    again = encode(tmp_path)
    again[4] = str(house / "images")
    assert cli.main(again) == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    said = refusal(capsys, [*train, str(tmp_path / "latents")], 2)
    assert "holds latents of another tokenizer" in said and "--run.init-from" in said
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")} == before
    assert cli.main([*train, str(house / "latents")]) == 0


def test_a_guide_changes_the_samples_is_named_and_must_fit(house: Path, tmp_path: Path, capsys) -> None:
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
    LightningDiT(dataclasses.replace(other.model, num_classes=7)).save_pretrained(tmp_path / "other")
    said = refusal(capsys, sample(house, tmp_path / "x", "--guide", str(tmp_path / "other"), "--cfg-scale", "2"), 2)
    assert "has model.num_classes 7, the generator 10" in said


def test_export_and_import_give_the_same_weights_back(house: Path, tmp_path: Path) -> None:
    assert cli.main(["import", str(house / "reference.pt"), "--out", str(tmp_path / "back")]) == 0
    first, second = (load_file(path / "model.safetensors") for path in (house / "exported", tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cli.main(["export", str(house / "run"), "--out", str(tmp_path / "plain"), "--ema", "0"]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert any(not torch.equal(first[name], plain[name]) for name in plain)


def test_impossible_requests_are_refused(house: Path, tmp_path: Path, capsys) -> None:
    assert "--image-size 60" in refusal(capsys, encode(house, "--image-size", "60"), 2)
    assert "label 99" in refusal(capsys, sample(house, tmp_path / "x", "--classes", "99"), 2)
    assert "latents_stats.pt" in refusal(capsys, sample(house, tmp_path / "x", "--latents", str(tmp_path)), 2)
    assert not (tmp_path / "x").exists()
    elsewhere = ["--data.path", str(house / "images"), "--run.out", str(tmp_path / "run")]
    assert str(house / "images") in refusal(capsys, [*DEBUG, *elsewhere], 2)
    wrong_kind = ["sample", str(house / "run"), "--tokenizer", str(house / "run"), "--out", "x"]
    assert "tokenizer" in refusal(capsys, wrong_kind, 2)


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (["export", "run", "--out"], "model.safetensors"),
        (["export", "exported", "--format", "reference", "--out"], "out"),
        (["import", "reference.pt", "--out"], "model.safetensors"),
    ],
)
def test_full_disk_leaves_no_weights(command: list[str], target: str, house: Path, tmp_path: Path, capsys) -> None:
    arguments = [command[0], str(house / command[1]), *command[2:], str(tmp_path / "out")]
    with room_for(100_000):
        message = refusal(capsys, arguments, 1)
    assert f"{target} cannot be written (" in message and "free some space" in message
    assert files(tmp_path) == []
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("num_bytes", [5_000, 10_000, 400_000])
def test_full_disk_leaves_no_checkpoint_and_the_run_goes_on_later(num_bytes: int, tmp_path: Path, capsys) -> None:
    arguments = [*DEBUG, "--run.out", str(tmp_path)]
    with room_for(num_bytes):
        message = refusal(capsys, arguments, 1)
    assert "step-00000002 could not be written" in message and "free some disk space" in message
    assert not [name for name in files(tmp_path) if name.startswith("checkpoints")]
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("recipe", ["lightningdit-b-debug", "vavae-f16d32-dinov2-debug"])
def test_a_run_folder_that_was_moved_is_the_same_run(recipe: str, tmp_path: Path) -> None:
    assert cli.main(["train", recipe, "--run.out", str(tmp_path / "run")]) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "named-otherwise")
    for path in (tmp_path / "elsewhere").rglob("*.json*"):
        if "checkpoints" not in path.parts:  # a power cut on the way
            path.write_bytes(path.read_bytes()[:100] + bytes(100))
    checkpoints = [name for name in files(tmp_path) if name.endswith(".safetensors")]
    assert cli.main(["train", recipe, "--run.out", str(tmp_path / "elsewhere" / "named-otherwise") + "/"]) == 0
    assert [name for name in files(tmp_path) if name.endswith(".safetensors")] == checkpoints
    assert load_config(type(get_recipe(recipe)), tmp_path / "elsewhere" / "named-otherwise" / "config.json")


@pytest.mark.parametrize("content", [b"", b"{", bytes(3000), b"[]", b"{}", None])
def test_a_config_that_is_damaged_is_that_of_a_checkpoint(
    content: bytes | None, house: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(house / "run", run)
    wanted = load_run_config(run)
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_bytes(content)
    (run / "checkpoints" / "step-00000009").mkdir()
    (run / "checkpoints" / "step-00000009" / "config.json").write_text("{")
    assert load_run_config(run) == wanted and "step-00000002/config.json instead" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    staged = tmp_path / "staged"
    staged.mkdir()
    run.rename(staged / "stage-1")
    assert load_run_config(staged) == wanted
    pytest.raises(UsageError, load_run_config, staged, stages=False).match("staged is no run folder")


def test_a_longer_run_on_data_elsewhere_is_the_same_run(tmp_path: Path, capsys) -> None:
    def train(out: str, images: int, *more: str) -> list[str]:
        return [*DEBUG, "--run.out", str(tmp_path / out), "--run.total-images", str(images), *more]

    assert cli.main(train("straight", 16)) == 0
    assert cli.main(train("longer", 8)) == 0
    assert cli.main(train("longer", 16, "--data.path", "debug:8")) == 0
    name = "checkpoints/step-00000004/model-00000-of-00001.safetensors"
    assert (tmp_path / "longer" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["run"]["total_images"] == 16
    message = refusal(capsys, train("longer", 16, "--data.path", "debug:12"), 2)
    assert "12" in message and "8" in message
    assert cli.main(train("decays", 8, "--optimizer.schedule", "linear")) == 0
    message = refusal(capsys, train("decays", 16, "--optimizer.schedule", "linear"), 2)
    assert "run.total_images 8, this command says 16" in message


def test_full_disk_leaves_no_config_and_weights_have_usual_permissions(tmp_path: Path, capsys, house: Path) -> None:
    with room_for(100):
        message = refusal(capsys, [*DEBUG, "--run.out", str(tmp_path)], 1)
    assert f"{tmp_path / 'config.json'} cannot be written (" in message and "free some space" in message
    assert files(tmp_path) == []
    for file in ("exported/model.safetensors", "run/checkpoints/step-00000002/model-00000-of-00001.safetensors"):
        assert (house / file).stat().st_mode == (house / "exported" / "config.json").stat().st_mode, file


@pytest.mark.parametrize("length", [0, 10, 40_000])
def test_truncated_weights_are_named(length: int, house: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "cut.pt").write_bytes((house / "reference.pt").read_bytes()[:length])
    message = refusal(capsys, ["import", str(tmp_path / "cut.pt"), "--out", str(tmp_path / "out")], 1)
    assert f"{tmp_path / 'cut.pt'} cannot be read" in message and "truncated or damaged" in message
    weights = tmp_path / "cut" / "model.safetensors"
    shutil.copytree(house / "exported", weights.parent)
    weights.write_bytes(weights.read_bytes()[:length])
    arguments = ["export", str(weights.parent), "--format", "reference", "--out", str(tmp_path / "out")]
    assert str(weights) in refusal(capsys, arguments, 1)
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_shape(house: Path, tmp_path: Path, capsys) -> None:
    content = torch.load(house / "reference.pt", weights_only=True)
    name = "blocks.0.attn.qkv.weight"
    content["ema"][name] = content["ema"][name][:-1]
    file = tmp_path / "odd.pt"
    torch.save(content, file)
    message = refusal(capsys, ["import", str(file), "--out", str(tmp_path / "out")], 2)
    assert f"{file}: tensor {name} has shape (191, 64), the model needs (192, 64)" in message
    folder, run = str(house / "exported"), str(tmp_path / "run")
    narrow = [*DEBUG, "--run.out", run, "--run.init-from", folder, "--model.hidden-size", "96"]
    assert f"{folder}: tensor pos_embed has shape" in refusal(capsys, narrow, 2)
    state = load_tensors(house / "exported" / "model.safetensors")
    write_safetensors({name: state[name]}, tmp_path / "part.safetensors")
    part = [*DEBUG, "--run.out", run, "--run.init-from", str(tmp_path / "part.safetensors")]
    assert "part.safetensors: tensor pos_embed" in refusal(capsys, part, 2)
    # what was refused does not bind the folder to its settings
    assert cli.main([*DEBUG, "--run.out", run]) == 0
    assert "model.hidden_size 64" in refusal(capsys, [*DEBUG, "--run.out", run, "--model.hidden-size", "96"], 2)


def test_tokenizer_trained_on_an_image_that_does_not_decode(tmp_path: Path, capsys) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = ["train", "vavae-f16d32-dinov2-debug", "--data.path", str(tmp_path / "images")]
    message = refusal(capsys, [*arguments, "--run.out", str(tmp_path / "run")], 1)
    assert "broken.png does not decode" in message and "--data.on-error skip" in message
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_names_that_are_no_utf8(house: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Classes, images and all folders, at a terminal of ASCII, from encode to report."""
    here = tmp_path / os.fsdecode(b"r\xe9[red]\x1b[45m\n$\\frac")
    shutil.copytree(house / "tokenizer", here / "tokenizer")
    for index, name in enumerate((b"caf\xe9", "caf\u00e9".encode(), b"x\n[b]")):
        shutil.copytree(house / "images" / "ab"[index % 2], here / "images" / os.fsdecode(name))
        (here / "images" / os.fsdecode(name) / os.fsdecode(b"\xff.png")).symlink_to(house / "images" / "a" / "0.png")
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    images, beton, run = str(here / "images"), str(here / "a.beton"), str(here / here.name)
    tokenizer = ["--tokenizer", str(here / "tokenizer")]
    drawing = ["--num-samples", "3", "--num-steps", "2", "--method", "euler"]
    for command in (
        encode(here),
        ["prepare", images, beton, "--size", "64", "--num-workers", "1"],
        [*DEBUG, "--run.out", run, "--data.path", str(here / "latents")],
        ["sample", run, "--classes", os.fsdecode(b"caf\xe9"), "--out", str(here / "s"), *drawing],
        ["evaluate", "tokenizer", *tokenizer, "--images", beton, "--out", str(here / "n.json")],
        ["report", run],
        ["export", run, "--out", str(here / "exported")],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    stdout.flush()
    told = stdout.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert r"3 classes (0 caf\xe9: 7 images, 1 caf" in told and r"r\xe9[red]\x1b[45m\n$\frac/report.html" in told
    page = (Path(run) / "report.html").read_text(encoding="utf-8")
    assert r"<h1>r\xe9[red]\x1b[45m" in page and "\x1b" not in page and (here / "s" / "samples.npz").is_file()


def test_a_reader_that_leaves_does_not_end_the_work(house: Path, tmp_path: Path, monkeypatch) -> None:
    for command in (["recipes", "xl"], encode(house, "--out", str(tmp_path / "out"))):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w", buffering=1) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert cli.main(command) == 0
    assert (tmp_path / "out" / "index.json").is_file()
