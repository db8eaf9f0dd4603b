"""Projects of one's own pictures: the commands of docs/own-images.md, what is chosen, and what is refused."""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vadit import cli
from vadit.config import Config, DiTConfig, TokenizerConfig
from vadit.config.files import load_run_config
from vadit.images.sources.folders import FolderSource
from vadit.project.measure import Machine, Pictures, look
from vadit.project.plan import LEAST_STEPS, SIZES, Planner
from vadit.runtime.errors import UsageError
from vadit.runtime.npz_files import Npz

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAMPS = Path("/usr/share/tuxpaint/stamps")


@pytest.fixture(scope="module")
def own_images() -> Iterator[Any]:
    """The benchmark that runs the same commands for longer."""
    sys.path.insert(0, str(BENCHMARKS))
    yield __import__("own_images")
    sys.path.remove(str(BENCHMARKS))


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_the_documents_commands_end_with_samples_and_the_project_may_be_moved(
    own_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_images.cut(tmp_path / "photos", 2, seed=0)
    monkeypatch.chdir(tmp_path)
    new, tokenizer, generator, sample = (command[1:] for command in own_images.commands())
    assert run(*new, "--size", "32", "--minutes", "0.01") == 0
    chosen = capsys.readouterr().out
    assert "20 pictures, 10 classes" in chosen and "the last tenth of the run" in chosen
    assert run(*generator) == 2
    assert "mine/tokenizer has been trained on 0 of" in capsys.readouterr().err
    assert run(*tokenizer, "--evaluation.every-images", "0") == 0
    os.rename("mine", "yours")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    moved = [word.replace("mine", "../yours") for word in generator]
    for said in ("run folder ../yours/generator", "../yours/generator has been trained to its end"):
        assert run(*moved, "--evaluation.grid-images", "4", "--evaluation.steps", "2") == 0
        assert said in "".join(capsys.readouterr())
    assert run(*(word.replace("mine", "../yours") for word in sample), "--num-samples", "12", "--num-steps", "2") == 0
    (drawn,) = Path("../yours").rglob("samples.npz")
    assert Npz(drawn).array("arr_0", (12, 32, 32, 3), "u").std() > 1
    config = load_run_config("../yours/generator")
    assert isinstance(config, DiTConfig) and config.model.num_classes == 10 and config.run.batch_size == 8
    assert len(list(Path("../yours/generator/evaluations").glob("*.png"))) >= 4
    reasons = Path("../yours/README.md").read_text()
    for name in ("autoencoder.base_channels", "engine.ema_decays", "run.total_images", "sample.cfg_scale"):
        assert f"| {name} |" in reasons
    assert run("new", "../yours", "--images", "../photos") == 2
    assert "../yours/tokenizer has been trained; name another folder" in capsys.readouterr().err


@pytest.mark.skipif(not STAMPS.is_dir(), reason="Debian's tuxpaint-stamps-default is not installed")
def test_drawings_with_transparency_in_nested_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    classes = sorted(path.name for path in STAMPS.iterdir() if any(path.rglob("*.png")))
    assert run("new", "mine", "--images", str(STAMPS), "--size", "32", "--minutes", "0.01") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"{len(list(STAMPS.rglob('*.png')))} pictures, {len(classes)} classes" in said and "transparen" in said
    assert run("train", "mine/tokenizer", "--evaluation.every-images", "0") == 0
    assert run("train", "mine/generator", "--evaluation.every-images", "0") == 0
    assert run("sample", "mine", "--classes", classes[0].title(), classes[-1], "--num-steps", "2") == 0
    (drawn,) = Path("mine").rglob("samples.npz")
    assert set(Npz(drawn).array("labels", (64,), "iu").tolist()) == {0, len(classes) - 1}


def modelled(name: str, config: Config, processes: int = 1) -> Any:
    """FLOPs of an image and bytes of a step, by a formula in place of a count that takes seconds."""
    if isinstance(config, DiTConfig):
        size = config.model.input_size**2 * config.model.depth * config.model.hidden_size**2 * 72
    else:
        size = config.autoencoder.image_size**2 * config.autoencoder.base_channels**2 * 700
    return (
        size
        if name == "training_flops"
        else SimpleNamespace(stages=[SimpleNamespace(total=config.run.batch_size * size / 8)])
    )


def plan(pictures: Pictures, minutes: float, *, free: int = 20 << 30, gpu: bool = False, **asked: Any) -> list[Any]:
    """Configs of tokenizer and generator at 50 GFLOP/s."""
    planner = Planner(pictures, Machine(gpu, 2, free, ""), lambda config: 5e10, minutes, **asked)
    return [draft.config for draft in planner.plan().values()]


def pictures(count: int = 400, classes: int = 10, side: int = 300) -> Pictures:
    return Pictures(count, classes, side, 0.01, "")


def test_choices_follow_pictures_machine_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("training_flops", "estimate"):
        monkeypatch.setattr(f"vadit.project.plan.{name}", functools.partial(modelled, name))
    short: list[Config] = plan(pictures(), 20)
    long: list[Config] = plan(pictures(), 200)
    for tokenizer, generator in (short, long):
        assert isinstance(tokenizer, TokenizerConfig) and isinstance(generator, DiTConfig)
        assert generator.model.input_size == tokenizer.autoencoder.latent_size
        assert generator.model.in_channels == tokenizer.autoencoder.latent_channels
        assert (generator.model.num_classes, generator.sample.cfg_scale) == (10, 2.0)
        for name, config in (("tokenizer", tokenizer), ("generator", generator)):
            steps = config.run.total_images // config.run.batch_size
            assert steps >= LEAST_STEPS[name]
            assert 40 <= config.run.total_images / config.run.log_every_images <= 80
        assert tokenizer.loss.disc_start_step < tokenizer.run.total_images // tokenizer.run.batch_size
        (decay,) = generator.engine.ema_decays
        assert decay ** (generator.run.total_images // generator.run.batch_size) < 1e-3, "the start is forgotten"
    sizes = [each[0].autoencoder.image_size for each in (short, long)]  # type: ignore[union-attr]
    assert sizes == [32, 64]
    few = plan(pictures(count=3, classes=1, side=20), 0.01)
    assert [config.run.batch_size for config in few] == [2, 2] and few[1].sample.cfg_scale == 1
    assert few[0].autoencoder.image_size == min(SIZES)
    small = plan(pictures(), 20, free=200 << 20, size=64)
    assert small[0].run.batch_size < 16 and small[0].autoencoder.image_size == 64


@pytest.mark.parametrize("place", ["photos/mine", "photos"])
def test_a_project_among_its_pictures_is_refused(place: str, tmp_path: Path, capsys: Any) -> None:
    picture(tmp_path / "photos" / "1.png")
    assert run("new", str(tmp_path / place), "--images", str(tmp_path / "photos")) == 2
    assert "lies inside --images" in capsys.readouterr().err


def test_what_is_no_project_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    picture(tmp_path / "photos" / "1.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert run("new", str(tmp_path / "full"), "--images", str(tmp_path / "photos")) == 2
    assert "full holds something that is no project of `vadit new`" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    assert run("train", str(tmp_path / "ful" / "tokenizer")) == 2
    assert "ful/tokenizer', and there is no such folder" in capsys.readouterr().err
    assert run("train", str(tmp_path / "full")) == 2
    assert "full is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--foundation-weights needs --foundation"),
        (["--foundation", "vit_tiny_patch16_224"], "foundation.weights .*none.pth is no file"),
    ],
)
def test_wrong_foundation_weights_are_refused_before_anything_is_written(
    flags: list[str], words: str, tmp_path: Path, capsys: Any
) -> None:
    picture(tmp_path / "photos" / "1.png")
    flags = [*flags, "--foundation-weights", str(tmp_path / "none.pth"), "--size", "32"]
    assert run("new", str(tmp_path / "mine"), "--images", str(tmp_path / "photos"), *flags) == 2
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "mine").exists()


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "2.jpg").write_bytes(b"\xff\xd8\xff none")
    found = look(FolderSource(tmp_path))
    assert (found.num_images, found.side) == (2, 40) and "1 cannot be read and are left out, such as" in found.words
    (tmp_path / "1.png").unlink()
    pytest.raises(UsageError, look, FolderSource(tmp_path)).match(
        r"none of 1 pictures of .* can be read, such as .*2.jpg"
    )


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(path)


def test_features_tell_pictures_from_noise_and_shuffled_patches(own_images: Any, tmp_path: Path) -> None:
    for name, seed in (("photos", 0), ("others", 1)):
        own_images.cut(tmp_path / name, 12, seed=seed)
    real, others = (own_images.pixels(tmp_path / name, 32) for name in ("photos", "others"))
    own = own_images.distance(real, others)
    assert 3 * own < own_images.distance(own_images.shuffled_patches(real), others)
    assert 3 * own < own_images.distance(own_images.noise(real), others)


def test_own_foundation_needs_no_classes(tmp_path: Path) -> None:
    from vadit.images.loader import ImageSet
    from vadit.models.foundation import FoundationModel
    from vadit.recipes.small import small_vit
    from vadit.train.classifier import own_foundation

    for index in range(3):
        picture(tmp_path / "photos" / f"{index}.png")
    images, spec = ImageSet(FolderSource(tmp_path / "photos"), 16), dataclasses.replace(small_vit(16, 8), own_steps=2)
    trained = own_foundation(spec, images, tmp_path, grid=2, device=torch.device("cpu"), seed=0)
    assert FoundationModel(trained, 2)(torch.zeros(1, 3, 16, 16)).shape == (1, 128, 2, 2)
    written = Path(trained.weights).stat().st_mtime_ns
    own_foundation(spec, images, tmp_path, grid=2, device=torch.device("cpu"), seed=0)
    assert Path(trained.weights).stat().st_mtime_ns == written, "it was trained again"
