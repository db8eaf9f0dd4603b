"""Encoding: values, equality over batch and world size, resume after a crash, refusals."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import IMAGE_SIDE, NUM_IMAGES, TOKENIZER, signed_pixels, write_images

from vadit.config import ImageDataSpec
from vadit.images.backends import open_images
from vadit.images.loader import ImageSet
from vadit.images.sources.folders import FolderSource
from vadit.latents.dataset import LatentDataset
from vadit.latents.encode import EncodeSummary, encode
from vadit.latents.loader import LatentLoader
from vadit.latents.shards import open_folder, open_shard
from vadit.models.autoencoder import Autoencoder
from vadit.models.pretrained import weights_hash
from vadit.runtime import files, launcher
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.owner import owned


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
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail_at_second)
        with pytest.raises(RunError, match=r"shard-00001.safetensors .*No space left on device.*free some space"):
            run(autoencoder, images, out)
    assert [path.name for path in out.iterdir()] == ["shard-00000.safetensors"]
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
    for tokenizer, change, message in (
        (autoencoder, {"dtype": "bf16"}, "dtype 'fp32', this command says 'bf16'"),
        (autoencoder, {"store": "sample"}, "store 'moments', this command says 'sample'"),
        (autoencoder, {"shard_size": 5}, "shard_size 4, this command says 5"),
        (autoencoder, {"flip": False}, "flip True, this command says False"),
        (same_shape, {}, "tokenizer '[0-9a-f]{16}', this command says '[0-9a-f]{16}'"),
        (other, {}, "config.latent_channels 3, this command says 4"),
    ):
        with pytest.raises(UsageError, match=rf"holds latents made with {message}; set --out to an empty folder"):
            run(tokenizer, images, tmp_path / "out", **change)
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
