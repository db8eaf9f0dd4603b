"""Features and images beside latents: same sample, same mirroring; encoding them; refusals."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import CHANNELS, CLASSES, IMAGE_SIDE, NUM_IMAGES, TOKENIZER, settings, signed_pixels, write_images
from safetensors.torch import load_file
from torch import Tensor

from vadit import cli
from vadit.config import DiTSpec, FoundationSpec, LatentDataSpec, RepaSpec
from vadit.images.loader import ImageSet, Request
from vadit.images.online import open_online_images
from vadit.images.pillow import decode
from vadit.latents.companions import DEBUG_WIDTH
from vadit.latents.dataset import DebugLatents, LatentDataset, open_latents
from vadit.latents.encode import encode
from vadit.latents.loader import LatentLoader
from vadit.latents.shards import LatentShardWriter, open_folder, save_index
from vadit.latents.statistics import compute_statistics
from vadit.models.autoencoder import Autoencoder
from vadit.models.foundation import FoundationModel
from vadit.runtime.errors import RunError, UsageError

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
