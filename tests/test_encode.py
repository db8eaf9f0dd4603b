"""Encoding: values, batches and ranks, resuming, refusals; features and images beside latents."""

import dataclasses
import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_files import CHANNELS, CLASSES, IMAGE_SIDE, NUM_IMAGES, TOKENIZER, settings, signed_pixels, write_images
from safetensors.torch import load_file
from torch import Tensor

from vadit import cli
from vadit.config import DiTSpec, FoundationSpec, ImageDataSpec, LatentDataSpec, RepaSpec
from vadit.images.backends import open_images
from vadit.images.loader import ImageSet, Request
from vadit.images.pillow import decode
from vadit.images.sources.folders import FolderSource
from vadit.latents.companions import DEBUG_WIDTH
from vadit.latents.dataset import DebugLatents, LatentDataset, open_latents
from vadit.latents.encode import EncodeSummary, encode
from vadit.latents.loader import LatentLoader
from vadit.latents.shards import LatentShardWriter, open_folder, open_shard, save_index
from vadit.latents.statistics import compute_statistics, load_statistics
from vadit.models.autoencoder import Autoencoder
from vadit.models.foundation import FoundationModel
from vadit.models.pretrained import weights_hash
from vadit.runtime import files, launcher
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.owner import owned
from vadit.train.online import open_online_images


@pytest.fixture
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(TOKENIZER)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return write_images(tmp_path / "images")


def run(autoencoder: Autoencoder, images: ImageSet, out: Path, **options: object) -> EncodeSummary:
    values: dict = {"batch_size": 3, "shard_size": 4, "dtype": "fp32", "num_workers": 2}
    return encode(autoencoder, images, out, **(values | options))


def contents(out: Path) -> dict[str, torch.Tensor]:
    shards = open_folder(out)
    return {
        "plain": torch.cat([shard.rows(0, shard.count, flipped=False) for shard in shards]).float(),
        "flipped": torch.cat([shard.rows(0, shard.count, flipped=True) for shard in shards]).float(),
        "labels": torch.cat([shard.labels for shard in shards]),
    }


def test_moments_are_the_autoencoders_own(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    autoencoder.train()
    done: list[int] = []
    summary = run(autoencoder, images, tmp_path / "out", progress=done.append)
    assert summary.num_images == NUM_IMAGES and summary.num_shards == 3 and summary.images_per_s > 0
    assert autoencoder.training
    assert done == sorted(done) and done[-1] == NUM_IMAGES
    autoencoder.eval()
    pixels = signed_pixels(images)
    found = contents(tmp_path / "out")
    assert torch.equal(found["labels"], images.source.labels)
    for key, inputs in (("plain", pixels), ("flipped", pixels.flip(-1))):
        with torch.no_grad():
            posterior = autoencoder.encode(inputs)
        torch.testing.assert_close(found[key], torch.cat([posterior.mean, posterior.std], 1), rtol=1e-4, atol=1e-5)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["num_images"] == NUM_IMAGES and index["classes"] == ["class0", "class1"]
    assert index["settings"]["tokenizer"] == weights_hash(autoencoder)
    latents, labels = next(iter(LatentLoader(LatentDataset(tmp_path / "out"), NUM_IMAGES)))
    assert latents.shape == (NUM_IMAGES, 3, 4, 4) and set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize("store", ["moments", "sample"])
def test_result_depends_on_neither_batch_nor_world_size(
    autoencoder: Autoencoder, images: ImageSet, tmp_path: Path, store: str, monkeypatch
) -> None:
    run(autoencoder, images, tmp_path / "one", store=store, seed=3)
    num_images, out = 0, tmp_path / "three"
    with monkeypatch.context() as patch:
        patch.setattr("vadit.runtime.distributed.join", lambda *_: None)
        patch.setattr("torch.distributed.destroy_process_group", lambda: None)
        for rank in (2, 1, 0):  # in one process: rank 0, which completes the folder, comes last
            patch.setattr(launcher, "_place", launcher.Place(rank, 3))
            num_images += run(autoencoder, images, out, store=store, seed=3, batch_size=2).num_images
            assert (out / "index.json").exists() == (rank == 0)
    assert num_images == NUM_IMAGES
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    for key, value in one.items():
        torch.testing.assert_close(three[key], value, rtol=1e-4, atol=1e-5)
    mean_one, mean_three = (LatentDataset(tmp_path / name).mean for name in ("one", "three"))
    torch.testing.assert_close(mean_three, mean_one, rtol=1e-4, atol=1e-5)
    if store == "sample":
        run(autoencoder, images, tmp_path / "other", store=store, seed=4)
        assert not torch.allclose(contents(tmp_path / "other")["plain"], one["plain"], atol=1e-2)


def test_bf16_without_mirror_images(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    run(autoencoder, images, tmp_path / "fp32", store="sample")
    run(autoencoder, images, tmp_path / "bf16", store="sample", dtype="bf16", flip=False)
    shards = open_folder(tmp_path / "bf16")
    assert all(shard.tensors[shard.key].dtype == torch.bfloat16 and not shard.has_flipped for shard in shards)
    rounded = contents(tmp_path / "fp32")["plain"].bfloat16().float()
    torch.testing.assert_close(contents(tmp_path / "bf16")["plain"], rounded, rtol=2**-7, atol=1e-5)


def test_resume_after_a_full_disk(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path, monkeypatch) -> None:
    run(autoencoder, images, tmp_path / "whole")
    out = tmp_path / "out"
    real, calls = files.os.replace, []

    def fail_at_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 4:  # a list and a shard each
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail_at_second)
        with pytest.raises(RunError, match=r"shard-00001.safetensors .*No space left on device.*free some space"):
            run(autoencoder, images, out)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["shard-00000.safetensors"]
    pytest.raises(UsageError, LatentDataset, out).match(r"is not finished")
    untouched = (out / "shard-00000.safetensors").stat().st_mtime_ns
    summary = run(autoencoder, images, out)
    assert summary.num_images == NUM_IMAGES - 4 and summary.num_shards == 2
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    index = (out / "index.json").stat().st_mtime_ns
    assert run(autoencoder, images, out).num_images == 0
    assert (out / "index.json").stat().st_mtime_ns == index


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped", "not finite", "lost", "of another folder"])
def test_a_damaged_shard_is_named_and_made_again(
    autoencoder: Autoencoder, images: ImageSet, tmp_path: Path, damage: str
) -> None:
    """By a run as far as it can tell, by `vadit encode` always."""
    out = tmp_path / "out"
    run(autoencoder, images, out)
    path = out / "shard-00001.safetensors"
    whole, index = path.read_bytes(), (out / "index.json").read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "of another folder":
        run(Autoencoder(TOKENIZER), images, tmp_path / "other")
        other = (tmp_path / "other" / path.name).read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + other[len(whole) // 2 :])
    else:
        place = open_shard(path).tensors["moments"].offset + 100
        bits = np.array([np.nan if damage == "not finite" else 0.5], "<f4").tobytes()
        path.write_bytes(whole[:-3] if damage == "cut short" else whole[:place] + bits + whole[place + 4 :])
    if damage in ("cut short", "not finite", "lost"):
        with pytest.raises(RunError, match=r"shard-00001.safetensors.*(encode|fetch)"):
            list(LatentLoader(LatentDataset(out, flip=False), 4))
    summary = run(autoencoder, images, out)
    assert (summary.num_images, summary.num_shards) == (4, 1)
    assert path.read_bytes() == whole and (out / "index.json").read_bytes() == index
    assert len(LatentDataset(out)) == NUM_IMAGES


def test_an_index_of_other_shards_is_written_anew(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(autoencoder, images, out)
    index, statistics = (out / "index.json").read_bytes(), (out / "latents_stats.pt").read_bytes()
    (out / "index.json").write_bytes(index.replace(b'"sha256": "', b'"sha256": "0', 1))
    (out / "latents_stats.pt").unlink()
    with pytest.raises(
        RunError, match=r"shard-00000.safetensors does not agree with index.json; run the `vadit encode"
    ):
        LatentDataset(out)
    assert run(autoencoder, images, out).num_images == 0
    assert (out / "index.json").read_bytes() == index and (out / "latents_stats.pt").read_bytes() == statistics


def test_values_that_are_not_finite_are_not_written(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    with torch.no_grad():
        autoencoder.quant_conv.bias[0] = float("nan")
    with pytest.raises(RunError, match=r"the moments of images 0 to 2 are not finite; check the network's weights"):
        run(autoencoder, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    run(autoencoder, images, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = Autoencoder(dataclasses.replace(autoencoder.spec, latent_channels=4))
    same_shape = Autoencoder(autoencoder.spec)
    white, upright = dataclasses.replace(images, alpha="white"), dataclasses.replace(images, exif="apply")
    for tokenizer, change, message in (
        (autoencoder, {"dtype": "bf16"}, "dtype 'fp32', this command says 'bf16'"),
        (autoencoder, {"precision": "bf16"}, "precision 'fp32', this command says 'bf16'"),
        (autoencoder, {"store": "sample"}, "store 'moments', this command says 'sample'"),
        (autoencoder, {"shard_size": 5}, "shard_size 4, this command says 5"),
        (autoencoder, {"flip": False}, "flip True, this command says False"),
        (autoencoder, {"images": white}, "alpha 'drop', this command says 'white'"),
        (autoencoder, {"images": upright}, "exif 'ignore', this command says 'apply'"),
        (same_shape, {}, "tokenizer '[0-9a-f]{16}', this command says '[0-9a-f]{16}'"),
        (other, {}, "config.latent_channels 3, this command says 4"),
    ):
        with pytest.raises(UsageError, match=rf"holds latents made with {message}; set --out to an empty folder"):
            run(tokenizer, change.pop("images", images), tmp_path / "out", **change)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "copy.safetensors").write_bytes(before["shard-00001.safetensors"])
    with pytest.raises(UsageError, match=r"copy.safetensors is none of this folder's 3 shards; remove it"):
        run(autoencoder, images, tmp_path / "out")


def test_two_at_once_are_refused(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    with owned(tmp_path / "out", ""), pytest.raises(UsageError, match=r"in use by .*; set --out to another one"):
        run(autoencoder, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_images_are_left_out_or_named(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    path = images.source.describe(5)
    Path(path).write_text("no image")
    pytest.raises(RunError, run, autoencoder, images, tmp_path / "out").match(f"{path} does not decode")
    assert not list((tmp_path / "out").glob("*.partial")) and not (tmp_path / "out" / "index.json").exists()
    skipping = ImageSet(FolderSource(tmp_path / "images"), IMAGE_SIDE, on_error="skip", max_bad_share=0.2)
    run(autoencoder, skipping, tmp_path / "out")
    good = [index for index in range(NUM_IMAGES) if index != 5]
    assert torch.equal(contents(tmp_path / "out")["labels"], images.source.labels[good])
    assert len(LatentDataset(tmp_path / "out")) == NUM_IMAGES - 1


def test_debug_images_encode(autoencoder: Autoencoder, tmp_path: Path) -> None:
    source = open_images(ImageDataSpec(path="debug:5"), IMAGE_SIDE)
    assert encode(autoencoder, source, tmp_path / "out", batch_size=2).num_images == 5
    assert LatentDataset(tmp_path / "out").num_classes == 5


COUNT, SIDE, WIDTH = NUM_IMAGES, 4, 3
MODEL = DiTSpec(input_size=SIDE, patch_size=2, in_channels=CHANNELS, num_classes=CLASSES)
CACHED, ONLINE = RepaSpec(weight=0.5), RepaSpec(weight=0.5, features="online")
VIT = FoundationSpec(
    name="vit_tiny_patch16_224",
    weights="random",
    model_args={"img_size": IMAGE_SIDE, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
)
ABOUT = {"name": "dinov2", "timm": "vit_large", "input_size": 28, "input_range": "normalized"}


def write_folder(folder: Path, *, features: dict | None = ABOUT, grid: int = 2) -> None:
    """Latent i is i everywhere and mirrored i + 100, its features i + 0.5 and i + 100.5; in two shards."""
    folder.mkdir()
    changes = {"store": "sample", "num_images": COUNT, "size": IMAGE_SIDE, "shard_size": 7, "features": features}
    for number, ids in enumerate((torch.arange(7), torch.arange(7, COUNT))):
        writer = LatentShardWriter(folder / f"shard-{number:05d}.safetensors", settings(**changes))
        values = ids[:, None, None, None].float()
        latents = values.expand(-1, CHANNELS, SIDE, SIDE)
        extra = (values + 0.5).expand(-1, WIDTH, grid, grid).clone()
        rows = {"latents": latents, "latents_flip": latents + 100, "labels": ids % CLASSES, "ids": ids}
        writer.add(rows | ({"features": extra, "features_flip": extra + 100} if features else {}))
        writer.close()
    compute_statistics(folder)
    save_index(folder, settings(**changes), [str(label) for label in range(CLASSES)])


def spec_of(folder: Path, **changes: object) -> LatentDataSpec:
    return LatentDataSpec(**({"path": str(folder), "normalize": False} | changes))  # type: ignore[arg-type]


def which(batch: tuple[Tensor, ...]) -> list[float]:
    return batch[0][:, 0, 0, 0].tolist()


def test_features_are_those_of_the_latent_and_mirrored_with_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "l")
    dataset = open_latents(spec_of(tmp_path / "l"), MODEL, CACHED)
    assert dataset.companion is not None and dataset.companion.shape == (WIDTH, 2, 2)
    seen = []
    for batch in islice(LatentLoader(dataset, 4, seed=3).stream(), 12):
        latents, labels, features = batch
        assert features.shape == (4, WIDTH, 2, 2) and features.dtype == torch.bfloat16
        expected = latents[:, :WIDTH, :2, :2] + 0.5
        assert torch.equal(features.float(), expected.bfloat16().float())
        assert torch.equal(labels, latents[:, 0, 0, 0].long() % 100 % CLASSES)
        seen += which(batch)
    assert {value >= 100 for value in seen} == {True, False}
    plain = open_latents(spec_of(tmp_path / "l"), MODEL)
    for with_features, without in zip(LatentLoader(dataset, 4, seed=3), LatentLoader(plain, 4, seed=3), strict=True):
        assert len(without) == 2 and torch.equal(with_features[0], without[0])


def test_features_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "none", features=None)
    with pytest.raises(UsageError, match=r"holds no foundation features; make them with `vadit encode --features dino"):
        open_latents(spec_of(tmp_path / "none"), MODEL, CACHED)
    write_folder(tmp_path / "coarse", grid=1)
    with pytest.raises(UsageError, match=r"features of 1x1 but the generator has 2x2 tokens.*--features-grid 2"):
        open_latents(spec_of(tmp_path / "coarse"), MODEL, CACHED)
    write_folder(tmp_path / "l")
    for change, message in (
        ({"name": "mae"}, r"holds features of dinov2 but repa.foundation.name is mae"),
        ({"input_range": "minus_one_one"}, r"input_range normalized but repa.foundation.input_range is minus_one_one"),
    ):
        with pytest.raises(UsageError, match=message):
            repa = RepaSpec(weight=0.5, foundation=FoundationSpec(**change))
            open_latents(spec_of(tmp_path / "l"), MODEL, repa)
    open_latents(spec_of(tmp_path / "l"), MODEL, RepaSpec(weight=0.5, foundation=FoundationSpec(name="vit_large")))
    assert open_latents(spec_of(tmp_path / "none"), MODEL, RepaSpec()).companion is None  # no weight, nothing to fit


def test_shards_with_and_without_features_do_not_mix(tmp_path: Path) -> None:
    write_folder(tmp_path / "l")
    write_folder(tmp_path / "none", features=None)
    (tmp_path / "none" / "shard-00001.safetensors").rename(tmp_path / "l" / "shard-00001.safetensors")
    with pytest.raises(RunError, match=r"shard-00001.* but shard-00000.*features.*; keep shards of one"):
        open_folder(tmp_path / "l")


def with_images(spec: LatentDataSpec, model: DiTSpec) -> LatentDataset | DebugLatents:
    """As the trainer does."""
    dataset = open_latents(spec, model, ONLINE)
    assert dataset.companion is None
    dataset.companion = open_online_images(spec, dataset, model.input_size // model.patch_size)
    return dataset


def sorted_folder(tmp_path: Path) -> tuple[LatentDataset | DebugLatents, ImageSet]:
    """Latents made as `vadit encode` makes them of a folder of images, of which the second does not decode."""
    images = write_images(tmp_path / "images", on_error="skip", max_bad_share=0.2)
    bad = Path(images.source.describe(1))
    whole = bad.read_bytes()
    bad.write_text("no image")
    torch.manual_seed(0)
    encode(Autoencoder(TOKENIZER), images, tmp_path / "l", batch_size=4, dtype="fp32", store="sample", shard_size=4)
    bad.write_bytes(whole)
    spec = spec_of(tmp_path / "l", images=str(tmp_path / "images"))
    return with_images(spec, DiTSpec(input_size=4, patch_size=2, in_channels=3, num_classes=2)), images


def test_online_images_are_those_that_were_encoded(tmp_path: Path) -> None:
    dataset, images = sorted_folder(tmp_path)
    assert dataset.companion is not None and dataset.companion.shape == (3, IMAGE_SIDE, IMAGE_SIDE)
    shards = [load_file(path) for path in sorted((tmp_path / "l").glob("*.safetensors"))]
    stored = {key: torch.cat([shard[key] for shard in shards]) for key in ("latents", "latents_flip", "ids")}
    assert stored["ids"].tolist() == [0, *range(2, COUNT)]  # the second of the folder is missing
    mirrored = []
    for latents, labels, pixels in islice(LatentLoader(dataset, 5, seed=2).stream(), 4):
        assert pixels.dtype == torch.uint8 and pixels.shape == (5, 3, IMAGE_SIDE, IMAGE_SIDE)
        for latent, label, picture in zip(latents, labels, pixels, strict=True):
            found = [
                (int(index), mirror)
                for key, mirror in (("latents", False), ("latents_flip", True))
                for index, other in zip(stored["ids"], stored[key], strict=True)
                if torch.equal(latent, other)
            ]
            ((index, mirror),) = found
            expected = decode(images, Request(index, mirror=mirror))
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), expected)
            assert int(images.source.labels[index]) == int(label)
            mirrored.append(mirror)
    assert set(mirrored) == {True, False}


def test_an_image_that_does_not_decode_any_more_is_named(tmp_path: Path) -> None:
    dataset, images = sorted_folder(tmp_path)
    path = Path(images.source.describe(7))
    path.write_text("no image")
    with pytest.raises(RunError, match=rf"{path}, the image of latent 6, does not decode any more"):
        list(LatentLoader(dataset, 4, seed=1))


def test_other_images_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "l", features=None)
    with pytest.raises(UsageError, match=r"repa.features is online but data.images is empty"):
        with_images(spec_of(tmp_path / "l"), MODEL)
    images = tmp_path / "images"
    write_images(images, classes=CLASSES)  # sorted by class: not the latents' order
    with pytest.raises(UsageError, match=r"class0/05.png is of class 0 but its latent 1 in .* is of class 1"):
        with_images(spec_of(tmp_path / "l", images=str(images)), MODEL)
    (images / "class0" / "05.png").unlink()
    with pytest.raises(UsageError, match=rf"holds {COUNT - 1} images but the latents of .* are of {COUNT}"):
        with_images(spec_of(tmp_path / "l", images=str(images)), MODEL)


def test_debug_latents_have_companions() -> None:
    spec = LatentDataSpec(path="debug:10")
    batch = next(LatentLoader(open_latents(spec, MODEL, CACHED), 4).stream())
    assert batch[2].shape == (4, DEBUG_WIDTH, 2, 2) and batch[2].dtype == torch.bfloat16
    batch = next(LatentLoader(with_images(spec, MODEL), 4).stream())
    assert batch[2].shape == (4, 3, 32, 32) and batch[2].dtype == torch.uint8


def test_encode_stores_the_models_features(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    torch.manual_seed(0)
    autoencoder, model = Autoencoder(TOKENIZER), FoundationModel(VIT, 2)
    options: dict = {"batch_size": 3, "dtype": "fp32", "shard_size": 4}
    encode(autoencoder, images, tmp_path / "without", **options)
    encode(autoencoder, images, tmp_path / "with", features=model, **options)
    signed = signed_pixels(images)
    shards = [load_file(path) for path in sorted((tmp_path / "with").glob("*.safetensors"))]
    for key, source in (("features", signed), ("features_flip", signed.flip(-1))):
        found = torch.cat([shard[key] for shard in shards])
        assert found.shape == (COUNT, 16, 2, 2) and found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), model(source), rtol=2**-7, atol=1e-4)
    for path in (tmp_path / "without").glob("*.safetensors"):
        plain, both = load_file(path), load_file(tmp_path / "with" / path.name)
        assert both.keys() - plain.keys() == {"features", "features_flip"}
        assert all(torch.equal(plain[key], both[key]) for key in plain)
    for changed in (None, FoundationModel(VIT, 2)):  # the latter with other weights
        with pytest.raises(UsageError, match=r"holds latents made with features"):
            encode(autoencoder, images, tmp_path / "with", features=changed, **options)


def test_encode_command_with_features(tmp_path: Path, capsys) -> None:
    Autoencoder(TOKENIZER).save_pretrained(tmp_path / "tokenizer")
    arguments = ["encode", "--tokenizer", str(tmp_path / "tokenizer"), "--images", "debug:3", "--no-flip"]
    arguments += ["--device", "cpu", "--image-size", "32"]
    arguments += ["--features", "vit_tiny_patch16_224", "--features-weights", "random"]
    assert cli.main([*arguments, "--out", str(tmp_path / "l")]) == 0
    (shard,) = open_folder(tmp_path / "l")
    assert shard.tensors["features"].shape == (3, 192, 2, 2) and "features_flip" not in shard.tensors
    assert shard.settings is not None and shard.settings.features is not None
    assert shard.settings.features["input_size"] == 32
    assert shard.settings.shard_size == 2_500
    assert cli.main([*arguments, "--out", str(tmp_path / "m"), "--features-grid", "0"]) == 2
    assert "--features-grid is 0" in capsys.readouterr().err


def test_added_images_alone_are_encoded(autoencoder: Autoencoder, images: ImageSet, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "images"
    run(autoencoder, images, out)
    before, old = {path: path.read_bytes() for path in out.iterdir()}, contents(out)
    statistics = load_statistics(out, 3)

    def again(**options: Any) -> EncodeSummary:
        return run(autoencoder, ImageSet(FolderSource(folder), IMAGE_SIDE), out, **options)

    # between the others, in a class of its own before theirs, and a file that was copied, at another time
    added = [folder / "class0" / "005.png", folder / "a new class" / "x.png"]
    for number, path in enumerate(added):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(images.source.describe(number + 3), path)
    os.utime(images.source.describe(2), (1, 1))
    pytest.raises(UsageError, again, store="sample").match("store 'moments', this command says 'sample'")
    assert again().num_images == 2 and again().num_images == 0
    kept = {path: path.read_bytes() for path in before if path.stem not in ("index", "latents_stats")}
    assert all(before[path] == data for path, data in kept.items()) and len(kept) == 6
    new = contents(out)
    for name, values in old.items():
        assert torch.equal(new[name][:NUM_IMAGES], values), name
    assert new["labels"][NUM_IMAGES:].tolist() == [2, 0]  # the new class comes last
    assert torch.allclose(new["plain"][[11, 12]], old["plain"][[4, 3]], atol=1e-5)
    dataset = LatentDataset(out)
    assert (len(dataset), dataset.num_classes) == (13, 3) and json.loads((out / "index.json").read_text())["classes"][
        2:
    ] == ["a new class"]
    assert dataset.image_ids()[0].tolist() == list(range(13))
    assert not torch.equal(load_statistics(out, 3).mean, statistics.mean)
    (out / "shard-00001.safetensors").write_bytes(b"damaged")
    (out / "shard-00003.safetensors").unlink()
    assert again().num_images == 6 and all(torch.allclose(contents(out)[name], new[name], atol=1e-5) for name in new)

    victim, there = Path(images.source.describe(0)), {path: path.read_bytes() for path in out.iterdir()}
    whole = victim.read_bytes()
    victim.unlink()
    pytest.raises(UsageError, again).match(r"class0/00\.png is not there any more; put it back as it was, or set --out")
    shutil.copy(images.source.describe(1), victim)
    pytest.raises(UsageError, again).match(r"of which class0/00\.png has changed; put it back")
    victim.write_bytes(whole)
    assert again().num_images == 0 and {path: path.read_bytes() for path in out.iterdir()} == there


def test_a_folder_without_lists_grows_once_they_are_made(
    images: ImageSet, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(autoencoder, images, out)
    shutil.copy(images.source.describe(0), tmp_path / "images" / "class1" / "more.png")
    for path in out.glob("shard-*.json"):
        path.unlink()
    grown = ImageSet(FolderSource(tmp_path / "images"), IMAGE_SIDE)
    pytest.raises(UsageError, run, autoencoder, grown, out).match("num_images 11, this command says 12")
    assert run(autoencoder, images, out).num_images == 0 and run(autoencoder, grown, out).num_images == 1
