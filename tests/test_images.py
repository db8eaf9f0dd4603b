"""Image folders, the crop rule, the Pillow decoder and the loader: order, ranks, resume, augmentation, bad files."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import SIDES, OddFile, center_crop, ids_of, odd_files, photo, psnr, turned
from PIL import Image

from vadit.config import ImageDataSpec
from vadit.images import backends, transforms
from vadit.images.backends import open_images, open_loader
from vadit.images.formats import open_image
from vadit.images.loader import Decoded, ImageLoader, ImageSet, Request, describe_classes, load_in_order
from vadit.images.pillow import decode, pillow_decoder
from vadit.images.pixels import image_grid, read_tiles, reconstruction_pairs, write_png
from vadit.images.sources.folders import FolderSource
from vadit.runtime.errors import RunError, UsageError

SIZE = 8


def save_picture(path: Path, seed: int, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """13 images in three classes, and a file that is no image."""
    root = tmp_path / "images"
    for number in range(13):
        save_picture(root / "bca"[number % 3] / f"{number:02d}.png", number)
    (root / "a" / "notes.txt").write_text("not an image")
    return root


def image_set(folder: Path, **settings: Any) -> ImageSet:
    return ImageSet(FolderSource(folder), SIZE, **settings)


def image_loader(
    images: ImageSet, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 2
) -> ImageLoader:
    return ImageLoader(images, batch_size, seed, rank, world_size, decoder=pillow_decoder(images, num_workers))


def load(images: ImageSet, index: int, *, seed: int, epoch: int) -> np.ndarray:
    return decode(images, images.requests([index], seed=seed, epoch=epoch)[0])


def test_classes_are_sorted_folder_names_and_pixels_follow_the_crop_rule(folder: Path) -> None:
    dataset = image_set(folder)
    assert len(dataset) == 13 and dataset.source.classes == ["a", "b", "c"]
    for index in range(13):
        path = dataset.source.describe(index)
        assert dataset.source.classes[int(dataset.source.labels[index])] == Path(path).parent.name
        with Image.open(path) as image:
            expected = np.asarray(center_crop(image.convert("RGB"), SIZE))
        assert np.array_equal(load(dataset, index, seed=0, epoch=0), expected)


def test_pictures_of_formats_that_are_not_read_are_counted_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.HEIC", "b/2.heic", "b/.3.heic", "c/4.avif", "c/5.Jp2", "c/notes.txt"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic")
    opened = open_images(ImageDataSpec(str(folder)), SIZE)
    line = f"{folder} holds pictures of formats that are not read, convert them to JPEG or PNG: 2 HEIC, 1 AVIF, 1 JP2"
    assert len(opened) == 13 and capsys.readouterr().err.splitlines() == [line]
    assert "not read" not in capsys.readouterr().err
    (folder / "a" / "6.jpg").write_bytes(b"\0\0\0\x18ftypheic")  # its name lies
    bad = open_images(ImageDataSpec(str(folder)), SIZE)
    index = next(index for index in range(14) if bad.source.describe(index).endswith("6.jpg"))
    pytest.raises(RunError, decode, bad, Request(index)).match("it is HEIC, or a film; needed: JPEG")


@pytest.mark.parametrize("new_world_size", [1, 2, 3])
def test_resume_in_mid_epoch_continues_exactly_also_with_other_ranks(folder: Path, new_world_size: int) -> None:
    dataset = image_set(folder, crop="random", flip=True)
    whole = image_loader(dataset, 6, seed=2)
    expected = list(islice(whole.stream(), 5))
    for batch in expected:
        assert batch.images.shape == (6, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.labels, dataset.source.labels[batch.ids])
    first = image_loader(dataset, 3, 2, 0, 2)
    stream = first.stream()
    for _ in range(2):
        next(stream)
    state = first.state_dict()  # taken while three batches are prefetched
    stream.close()
    assert state["images_seen"] == 12
    streams = []
    for rank in range(new_world_size):
        loader = image_loader(dataset, 6 // new_world_size, 99, rank, new_world_size)
        loader.load_state_dict(state)
        streams.append(loader.stream())
    for batch in expected[2:]:
        parts = [next(stream) for stream in streams]
        order = [position for rank in range(new_world_size) for position in range(rank, 6, new_world_size)]
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids[order])
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images[order])


def test_augmentation_depends_on_seed_image_and_epoch_alone(folder: Path) -> None:
    dataset = image_set(folder, crop="random", flip=True)
    variants = {load(dataset, 4, seed=0, epoch=epoch).tobytes() for epoch in range(99)}
    assert len(variants) == 6  # a 12 x 15 image becomes 8 x 10, which has three squares
    assert np.array_equal(load(dataset, 4, seed=0, epoch=2), load(dataset, 4, seed=0, epoch=2))
    flipped = image_set(folder, flip=True)
    plain = decode(flipped, Request(4))
    seen = [load(flipped, 4, seed=0, epoch=epoch) for epoch in range(40)]
    mirrored = sum(np.array_equal(pixels, plain[:, ::-1]) for pixels in seen)
    assert mirrored + sum(np.array_equal(pixels, plain) for pixels in seen) == 40 and 8 < mirrored < 32


def test_no_threads_are_left_behind(folder: Path) -> None:
    before = set(threading.enumerate())
    loader = image_loader(image_set(folder), 2, num_workers=3)
    for batch in loader.stream():
        assert len(batch.ids) == 2
        break
    list(loader)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("vadit-data")]


def test_all_images_bad_ends_with_an_error(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("x")
    with pytest.raises(RunError, match=r"none of the 3 images"):
        list(image_loader(image_set(tmp_path, on_error="skip", max_bad_share=1.0), 2))


def damage(folder: Path) -> Path:
    path = folder / "a" / "02.png"
    path.write_text("no image at all")
    return path


def test_in_order_loading_takes_each_image_once_unmirrored(folder: Path) -> None:
    path = damage(folder)
    dataset = image_set(folder, crop="random", flip=True, on_error="skip", max_bad_share=0.1)
    bad = dataset.source.paths.index(str(path))
    with pillow_decoder(dataset, 2)() as decoder:
        batches = list(load_in_order(dataset, range(2, 13), 3, decoder))
    assert ids_of(batches) == [index for index in range(2, 13) if index != bad]
    assert np.array_equal(batches[-1].images[-1].permute(1, 2, 0).numpy(), decode(dataset, Request(12)))


def test_unusable_folders_are_named(tmp_path: Path, folder: Path) -> None:
    needed = r"set IMAGES of vadit prepare, .*--data.path of train"
    for path in ("", tmp_path / "nowhere", folder / "a" / "notes.txt"):
        pytest.raises(UsageError, FolderSource, path).match(rf"'{path}' is no folder; {needed}")
    (tmp_path / "empty").mkdir()
    pytest.raises(UsageError, FolderSource, tmp_path / "empty").match(r"empty holds no images")
    (tmp_path / "empty" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    pytest.raises(UsageError, FolderSource, tmp_path / "empty").match(r"no images .*JPEG or PNG: 1 HEIC\)")
    (folder / "d").mkdir()
    pytest.raises(UsageError, FolderSource, folder).match(r"class folder d holds no images")
    save_picture(folder / "stray.png", 0)
    pytest.raises(UsageError, FolderSource, folder).match(r"beside its class folders \(such as stray.png\)")


def test_debug_images_need_no_files() -> None:
    dataset = open_images(ImageDataSpec(path="debug:6"), 16)
    batches = list(open_loader(ImageDataSpec(path="debug:6"), dataset, 4)[0])
    assert [batch.images.shape for batch in batches] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    assert sorted(ids_of(batches)) == list(range(6))
    assert batches[0].images.float().std() > 10
    pytest.raises(UsageError, open_images, ImageDataSpec(path="debug:x"), 16).match(r"debug:x")


def test_a_bad_image_known_from_before_is_not_tried_again(folder: Path, monkeypatch) -> None:
    path = damage(folder)
    dataset = image_set(folder, on_error="skip", max_bad_share=0.1)
    bad = dataset.source.paths.index(str(path))
    loader = image_loader(dataset, 4)
    list(loader)
    tried: list[int] = []
    read = dataset.source.read
    monkeypatch.setattr(dataset.source, "read", lambda index: tried.append(index) or read(index))
    assert len(ids_of(loader)) == len(tried) == 13 and bad not in tried


@pytest.mark.parametrize(
    ("content", "classes", "labels"),
    [
        ("b/00.png {0}cat\n\na/02.png{0} ant\nc/01.png{0}cat\n", "ant cat", [1, 0, 1]),
        ("\ufeffb/00.png{0}10\r\na/02.png{0}2.0\r\n./c/01.png{0}+1e1", "0 1 2 3 4 5 6 7 8 9 10", [10, 2, 10]),
        (
            "# made by hand\nfilename{0}label\nb/00.png{0}1\na/02.png{0}007\rc/01.png{0}1\n",
            "0 1 2 3 4 5 6 7",
            [1, 7, 1],
        ),
        ('id,file,class\n0,"b/00.png","1"\n1,"a/02.png","0"\n2,c/01.png,1\n', "0 1", [1, 0, 1]),
        ('"Label"{0}"File"\nbig{0}b/00.png\ncat{0}a/02.png\nbig{0}c/01.png\n', "big cat", [0, 1, 0]),
    ],
)
@pytest.mark.parametrize("separator", [" ", ",", ";", "\t"])
def test_a_labels_file_gives_order_and_classes(
    folder: Path, tmp_path: Path, separator: str, content: str, classes: str, labels: list[int]
) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(content.format(separator).encode())
    source = FolderSource(folder, file)
    assert source.classes == classes.split() and source.labels.tolist() == labels
    assert [Path(path).name for path in source.paths] == ["00.png", "02.png", "01.png"]


def test_names_in_a_labels_file_may_hold_what_parts_others(tmp_path: Path) -> None:
    names = ("my cat.png", "1,5.png", "a;b.png", "#1.png")
    for name in names:
        save_picture(tmp_path / "images" / name, 0)
    for line in ("{} 3", '"{}",3', "{}\t3", '"{}";3', "{}\t3 #by hand", '"{}",3.0 # by hand'):
        (tmp_path / "labels").write_text("".join(line.format(name) + "\n" for name in names))
        source = FolderSource(tmp_path / "images", tmp_path / "labels")
        assert [Path(path).name for path in source.paths] == list(names) and set(source.labels.tolist()) == {3}


def test_a_labels_file_is_read_in_linear_time(tmp_path: Path, monkeypatch) -> None:
    save_picture(tmp_path / "images" / "00000.png", 0)
    asked: list[object] = []
    exists = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: asked.append(path) or exists(path))
    (tmp_path / "labels").write_text("".join(f"{number:05d}.png {number % 7}\n" for number in range(20_000)))
    assert len(FolderSource(tmp_path / "images", tmp_path / "labels", on_error="skip")) == 20_000
    assert len(asked) <= 20_000


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            [str(number) for number in range(12)],
            "12 classes, in the order of their numbers (0: 13 images, 1: 1, 2: 1, 3: 1, 4: 1, ..., 11: 1)",
        ),
        (["007", "8", "10"], "3 classes, in the order of their numbers (0 007: 4 images, 1 8: 1, 2 10: 1)"),
        (["10", "9", "cat"], "3 classes (0 10: 4 images, 1 9: 1, 2 cat: 1)"),
    ],
)
def test_folders_named_by_numbers_keep_their_order(tmp_path: Path, names: list[str], told: str) -> None:
    for number, name in enumerate(names):
        save_picture(tmp_path / name / "x.png", 0)
        save_picture(tmp_path / names[0] / f"{number}.png", 0)
    source = FolderSource(tmp_path)
    assert source.classes == names and describe_classes(source.classes, source.labels) == told


class Broken:
    """A stand-in for DALI on a machine where it imports and does not work."""

    def __init__(self, images: ImageSet, fault: str) -> None:
        self.images, self.fault = images, fault

    def __enter__(self) -> "Broken":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, requests: Sequence[Request]) -> Callable[[], Decoded]:
        if self.fault == "raises":
            raise OSError("libcuda.so.1 is missing")
        pixels = torch.stack([torch.from_numpy(decode(self.images, request).copy()) for request in requests])
        pixels = pixels.roll(1, dims=2) if self.fault == "shifts" else pixels
        return lambda: Decoded(pixels, {})


def with_dali(monkeypatch, fault: str | None) -> None:
    """DALI as it is where it is not installed (None), where it works ("none"), or has a fault."""
    if fault is None:
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        return
    real = backends._decoder

    def decoder(name: str, images: ImageSet, num_workers: int, device: Any) -> Any:
        return (lambda: Broken(images, str(fault))) if name == "dali" else real(name, images, num_workers, device)

    monkeypatch.setattr(backends, "_decoder", decoder)


@pytest.mark.parametrize(
    ("fault", "name", "reason"),
    [
        (None, "torch", "NVIDIA DALI cannot be imported"),
        ("none", "dali", "it is here, and it reads"),
        ("raises", "torch", "it does not run here (libcuda.so.1 is missing)"),
        ("shifts", "torch", "its pixels are not Pillow's here"),
    ],
)
def test_auto_takes_what_works(folder: Path, monkeypatch, fault: str | None, name: str, reason: str) -> None:
    with_dali(monkeypatch, fault)
    spec = ImageDataSpec(path=str(folder))
    _, choice = open_loader(spec, open_images(spec, SIZE), 2)
    assert choice.name == name and reason in choice.reason and not choice.refused
    wanted = ImageDataSpec(path=str(folder), loader="dali")
    if name == "dali":
        assert open_loader(wanted, open_images(wanted, SIZE), 2)[1].name == "dali"
    else:
        with pytest.raises(UsageError, match=r"set to dali, but .*; set --loader torch or auto \(.*--data.loader\)"):
            open_loader(wanted, open_images(wanted, SIZE), 2)


def test_a_run_stays_with_the_loader_that_it_began_with(folder: Path, monkeypatch) -> None:
    with_dali(monkeypatch, "none")
    spec = ImageDataSpec(path=str(folder))
    images = open_images(spec, SIZE)
    assert open_loader(spec, images, 2, begun_with="torch")[1].name == "torch"
    with_dali(monkeypatch, "raises")
    choice = open_loader(spec, images, 2, begun_with="dali")[1]
    assert choice.name == "torch" and "the run began with dali, but it does not run here" in choice.refused


def test_quasi_random_order_needs_a_beton(folder: Path) -> None:
    spec = ImageDataSpec(path=str(folder), order="quasi_random", loader="torch")
    with pytest.raises(UsageError, match=r"data.order quasi_random is for a .beton, and .*set --data.order random"):
        open_loader(spec, open_images(spec, SIZE), 2)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def crop(image: Image.Image, kind: transforms.CropKind, size: int, seed: int) -> np.ndarray:
    return np.asarray(transforms.apply_crop(image, transforms.plan_crop(kind, *image.size, size, seed)))


def naive_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's rule, spelled with arrays: halve by averaging, bicubic to the short side, slice the middle."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [(32, 32), (33, 47), (47, 33), (64, 64), (63, 200), (200, 129), (131, 128), (5, 9), (1, 40), (300, 70)],
)
def test_center_crop_is_the_adm_rule(width: int, height: int) -> None:
    image = picture(width, height)
    cropped = center_crop(image, 32)
    assert cropped.size == (32, 32)
    assert np.array_equal(np.asarray(cropped), naive_center_crop(image, 32))


def test_crops_of_odd_shapes() -> None:
    image = picture(64, 64)
    pixels = np.asarray(image).astype(np.float64)
    for _ in range(2):
        side = len(pixels) // 2
        pixels = pixels.reshape(side, 2, side, 2, 3).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(image, 16)).astype(np.float64)
    assert np.abs(cropped - pixels).max() <= 2.0  # four roundings to 8 bits: two passes, rows and columns
    pytest.raises(ValueError, center_crop, picture(1, 5000), 32).match("1 x 5000 pixels")
    image = picture(90, 40)  # the short side becomes 32, the long one 72
    whole = np.asarray(image.resize((72, 32), Image.Resampling.BICUBIC))
    crops = [crop(image, "random", 32, seed) for seed in range(40)]
    places = {next(x for x in range(41) if np.array_equal(whole[:, x : x + 32], pixels)) for pixels in crops}
    assert min(places) < 8 and max(places) > 32, "the whole width is used"
    assert np.array_equal(crops[5], crop(image, "random", 32, 5))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr", "HSV", "F", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = picture(20, 20, "L").convert(mode) if mode in ("LA", "F", "I") else picture(20, 20, mode)
    assert transforms.to_rgb(source).mode == "RGB"


def transparent(mode: str) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A picture of a mode, its colours (8, 6, 3) and their opacity (8, 6) from 0 to 1."""
    draw = np.random.default_rng(len(mode))
    rgb, alpha = draw.integers(0, 256, (8, 6, 3), dtype=np.uint8), draw.integers(0, 256, (8, 6), dtype=np.uint8)
    if mode in ("RGBA", "LA"):
        rgb = np.repeat(rgb[..., :1], 3, axis=2) if mode == "LA" else rgb
        pixels = np.dstack([rgb[..., :1], alpha]) if mode == "LA" else np.dstack([rgb, alpha])
        return Image.fromarray(pixels), rgb, alpha / 255
    colours = draw.integers(1, 256, (4, 3), dtype=np.uint8)
    indices = draw.integers(0, 4, (8, 6), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    image.info["transparency"] = 2
    if mode == "RGB":  # a PNG's transparent colour
        image = Image.fromarray(colours[indices])
        image.info["transparency"] = tuple(colours[2].tolist())
    return image, colours[indices], (indices != 2).astype(float)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_dropped_or_laid_on_a_colour(mode: str, tmp_path: Path) -> None:
    image, rgb, opacity = transparent(mode)
    image.save(tmp_path / "it.png", transparency=image.info.get("transparency"))
    for alpha, ground in (("drop", None), ("white", 255), ("black", 0)):
        with Image.open(tmp_path / "it.png") as opened:
            opened.load()
            found = np.asarray(transforms.to_rgb(opened, alpha))  # type: ignore[arg-type]
        expected = rgb if ground is None else rgb * opacity[..., None] + ground * (1 - opacity[..., None])
        assert np.abs(found - expected).max() <= (0 if ground is None else 1), alpha


@pytest.mark.parametrize("file", odd_files().values(), ids=lambda file: file.name)
def test_pictures_without_transparency_are_the_same_on_any_colour(file: OddFile) -> None:
    plain, white = (np.asarray(transforms.to_rgb(open_image(file.data), alpha)) for alpha in ("drop", "white"))
    assert np.array_equal(plain, white) == (file.name not in ("rgba.png", "palette-alpha.png"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_pictures_where_it_is_applied(kind: str, tmp_path: Path) -> None:
    upright = np.array(photo(0, 61, 40))
    options = {} if kind == "PNG" else {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0}
    for value in SIDES:
        (tmp_path / f"{value}.png").write_bytes(turned(upright, value, kind, **options))
    images = {exif: ImageSet(FolderSource(tmp_path), 40, exif=exif) for exif in ("ignore", "apply")}  # type: ignore[arg-type]
    expected = np.asarray(center_crop(Image.fromarray(upright), 40))
    for index, value in enumerate(SIDES):
        found = {exif: decode(each, Request(index)) for exif, each in images.items()}
        assert psnr(found["apply"], expected) >= 38, value
        assert (psnr(found["ignore"], expected) >= 38) == (value == 1), value
    assert not psnr(expected[:, ::-1], expected) >= 38 and not psnr(expected.swapaxes(0, 1), expected) >= 38
    (tmp_path / "1.png").write_bytes(turned(upright, 1, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"))  # cut
    assert psnr(decode(images["apply"], Request(0)), expected) == float("inf")


def test_what_alpha_and_exif_concern_is_counted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.array(photo(0))
    transparent("RGBA")[0].save(folder / "a" / "clear.png")
    (folder / "b" / "phone.jpg").write_bytes(turned(pixels, 6))
    (folder / "b" / "scanner.jpg").write_bytes(turned(pixels, 1))
    (folder / "c" / "damaged.png").write_bytes(b"no picture")
    open_images(ImageDataSpec(str(folder)), SIZE)
    assert capsys.readouterr().err.splitlines() == [
        f"{folder} holds 1 of 17 pictures with transparency: dropped (data.alpha)",
        f"{folder} holds 1 of 17 pictures with EXIF's orientation: ignored (data.exif)",
    ]
    monkeypatch.setattr(backends, "SURVEYED", 9)
    open_images(ImageDataSpec(str(folder), alpha="white", exif="apply"), SIZE)
    assert capsys.readouterr().err.splitlines() == [
        f"{folder} holds 1 of 9 pictures (looked at, of 17) with transparency: laid on white (data.alpha)",
        f"{folder} holds 1 of 9 pictures (looked at, of 17) with EXIF's orientation: applied (data.exif)",
    ]


def test_grids_and_pairs_of_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * 16 + 2, 3 * 16 + 4, 3)
    np.testing.assert_array_equal(grid[18:34:2, 18:34:2], images[4])
    np.testing.assert_array_equal(grid[19:34:2, 19:34:2], images[4])
    assert (grid[18:, 36:] == 255).all()  # the place of the missing sixth
    assert image_grid(images).size[0] == 3 * 64 + 4  # 8 pixels grow to 64
    originals = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    picture = np.asarray(reconstruction_pairs(originals, 255 - originals, columns=3, scale=1))
    height, width = 2 * (2 * 16 + 2) + 10, 3 * 16 + 4
    assert picture.shape[0] == height
    body = picture[:, -width:]
    np.testing.assert_array_equal(body[:16, :16], originals[0])
    np.testing.assert_array_equal(body[18:34, :16], 255 - originals[0])
    np.testing.assert_array_equal(body[44:60, 18:34], originals[4])
    assert picture[:, : -width - 4].min() < 200  # the labels are there
    pytest.raises(UsageError, reconstruction_pairs, originals, originals[:4]).match("one shape")
    pytest.raises(UsageError, image_grid, originals.astype(np.float32)).match("uint8")
    # a file says where its tiles are; of what it says wrongly, nothing is made
    pairs = reconstruction_pairs(originals, 255 - originals, columns=3, scale=1)
    for picture, tiles in ((image_grid(images, columns=3, scale=1), images), (pairs, originals)):
        write_png(tmp_path / "a.png", picture)
        with Image.open(tmp_path / "a.png") as opened:
            np.testing.assert_array_equal(read_tiles(opened, 9)[:, : tiles.shape[1]], tiles)
            assert len(read_tiles(opened, 2)) == 2
            for note in ("", "5", "5 8 8 x 0", "5 0 8 2 0", "9 8 900 2 0", "5 8 -2 2 0", "9999999999 8 8 2 90"):
                opened.info["tiles"] = note
                found = read_tiles(opened, 9)
                assert found is None or found.shape[1:] == (8, 8, 3), note
    assert read_tiles(Image.new("RGB", (40, 40)), 9) is None
