"""Bad input through the commands: one sentence that names value and remedy, the exit code, and nothing half written.

A limit on the size of files (RLIMIT_FSIZE) stands for the full disk: the writes themselves fail, in whatever library.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import room_for

from vadit import cli
from vadit.models.pretrained import read_safetensors, write_safetensors

DEBUG = ["train", "lightningdit-b-debug"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator's run, exported in both formats."""
    folder = tmp_path_factory.mktemp("house")
    assert cli.main([*DEBUG, "--run.out", str(folder / "run")]) == 0
    assert cli.main(["export", str(folder / "run"), "--out", str(folder / "exported")]) == 0
    reference = ["--format", "reference", "--out", str(folder / "reference.pt")]
    assert cli.main(["export", str(folder / "exported"), *reference]) == 0
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """The sentence that the command ends with."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    text = capsys.readouterr().err
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in text, text
    return last


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (["export", "run", "--out"], "model.safetensors"),
        (["export", "exported", "--format", "reference", "--out"], "out"),
        (["import", "reference.pt", "--out"], "model.safetensors"),
    ],
)
def test_full_disk_leaves_no_weights(
    command: list[str], target: str, house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command[0], str(house / command[1]), *command[2:], str(tmp_path / "out")]
    with room_for(100_000):
        message = refusal(capsys, arguments, 1)
    assert f"{target} cannot be written (" in message and "free some space" in message
    assert files(tmp_path) == []
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("num_bytes", [5_000, 10_000, 400_000])
def test_full_disk_leaves_no_checkpoint_and_the_run_goes_on_later(
    num_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    checkpoints = [name for name in files(tmp_path) if name.endswith(".safetensors")]
    assert cli.main(["train", recipe, "--run.out", str(tmp_path / "elsewhere" / "named-otherwise") + "/"]) == 0
    assert [name for name in files(tmp_path) if name.endswith(".safetensors")] == checkpoints


def test_a_longer_run_on_data_elsewhere_is_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_full_disk_leaves_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with room_for(100):
        message = refusal(capsys, [*DEBUG, "--run.out", str(tmp_path)], 1)
    assert f"{tmp_path / 'config.json'} cannot be written (" in message and "free some space" in message
    assert files(tmp_path) == []


def test_weights_have_the_permissions_of_any_new_file(house: Path) -> None:
    for file in ("exported/model.safetensors", "run/checkpoints/step-00000002/model-00000-of-00001.safetensors"):
        assert (house / file).stat().st_mode == (house / "exported" / "config.json").stat().st_mode, file


@pytest.mark.parametrize("length", [0, 10, 40_000])
def test_truncated_weights_are_named(
    length: int, house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.pt").write_bytes((house / "reference.pt").read_bytes()[:length])
    message = refusal(capsys, ["import", str(tmp_path / "cut.pt"), "--out", str(tmp_path / "out")], 1)
    assert f"{tmp_path / 'cut.pt'} cannot be read" in message and "truncated or damaged" in message
    weights = tmp_path / "cut" / "model.safetensors"
    shutil.copytree(house / "exported", weights.parent)
    weights.write_bytes(weights.read_bytes()[:length])
    arguments = ["export", str(weights.parent), "--format", "reference", "--out", str(tmp_path / "out")]
    assert str(weights) in refusal(capsys, arguments, 1)
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_shape(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    state = read_safetensors(house / "exported" / "model.safetensors")
    write_safetensors({name: state[name]}, tmp_path / "part.safetensors")
    part = [*DEBUG, "--run.out", run, "--run.init-from", str(tmp_path / "part.safetensors")]
    assert "part.safetensors: tensor pos_embed" in refusal(capsys, part, 2)
    # what was refused does not bind the folder to its settings
    assert cli.main([*DEBUG, "--run.out", run]) == 0
    assert "model.hidden_size 64" in refusal(capsys, [*DEBUG, "--run.out", run, "--model.hidden-size", "96"], 2)


def test_tokenizer_trained_on_an_image_that_does_not_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = ["train", "vavae-f16d32-dinov2-debug", "--data.path", str(tmp_path / "images")]
    message = refusal(capsys, [*arguments, "--run.out", str(tmp_path / "run")], 1)
    assert "broken.png does not decode" in message and "--data.on-error skip" in message
    assert not list(tmp_path.rglob("checkpoints/*"))
