"""Image folders and their loader: order, ranks, resume, augmentation, bad files, bad folders."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vadit.config import ImageDataSpec
from vadit.data.images_torch import ImageBatch, ImageFolder, ImageLoader, load_in_order, open_images
from vadit.data.transforms import center_crop
from vadit.errors import RunError, UsageError

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


def ids_of(batches: Iterable[ImageBatch]) -> list[int]:
    return [index for batch in batches for index in batch.ids.tolist()]


def test_classes_are_sorted_folder_names_and_pixels_follow_the_crop_rule(folder: Path) -> None:
    dataset = ImageFolder(folder, SIZE)
    assert len(dataset) == 13 and dataset.classes == ["a", "b", "c"]
    for index, path in enumerate(dataset.paths):
        assert dataset.classes[int(dataset.labels[index])] == Path(path).parent.name
        with Image.open(path) as image:
            expected = np.asarray(center_crop(image.convert("RGB"), SIZE)).transpose(2, 0, 1)
        assert np.array_equal(dataset.load(index, seed=0, epoch=0), expected)


def test_flat_folder_has_one_class(tmp_path: Path) -> None:
    for number in range(3):
        save_picture(tmp_path / f"{number}.JPG", number)
    dataset = ImageFolder(tmp_path, SIZE)
    assert len(dataset) == 3 and dataset.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_once_per_epoch(folder: Path, world_size: int) -> None:
    dataset = ImageFolder(folder, SIZE)
    loaders = [ImageLoader(dataset, 2, 5, rank, world_size, num_workers=2) for rank in range(world_size)]
    orders = []
    for epoch in range(3):
        assert all(loader.epoch == epoch for loader in loaders)
        per_rank = [ids_of(loader) for loader in loaders]
        assert sorted(index for ids in per_rank for index in ids) == list(range(13))
        orders.append(per_rank)
    assert orders[0] != orders[1]
    assert {loader.state_dict()["images_seen"] for loader in loaders} == {39}


def test_stream_gives_full_batches_across_epoch_ends(folder: Path) -> None:
    loader = ImageLoader(ImageFolder(folder, SIZE), 5, seed=1, num_workers=2)
    batches = list(islice(loader.stream(), 8))
    assert all(batch.images.shape == (5, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8 for batch in batches)
    ids = ids_of(batches)
    assert [sorted(ids[start : start + 13]) for start in (0, 13, 26)] == [list(range(13))] * 3
    assert loader.images_seen == 40
    assert all(torch.equal(batch.labels, loader.dataset.labels[batch.ids]) for batch in batches)


@pytest.mark.parametrize("new_world_size", [1, 2, 3])
def test_resume_in_mid_epoch_continues_exactly_also_with_other_ranks(folder: Path, new_world_size: int) -> None:
    dataset = ImageFolder(folder, SIZE, crop="random", flip=True)
    whole = ImageLoader(dataset, 6, seed=2, num_workers=2)
    expected = list(islice(whole.stream(), 5))
    first = ImageLoader(dataset, 3, 2, 0, 2, num_workers=2)
    stream = first.stream()
    for _ in range(2):
        next(stream)
    state = first.state_dict()  # taken while three batches are prefetched
    stream.close()
    assert state["images_seen"] == 12
    streams = []
    for rank in range(new_world_size):
        loader = ImageLoader(dataset, 6 // new_world_size, 99, rank, new_world_size, num_workers=2)
        loader.load_state_dict(state)
        streams.append(loader.stream())
    for batch in expected[2:]:
        parts = [next(stream) for stream in streams]
        order = [position for rank in range(new_world_size) for position in range(rank, 6, new_world_size)]
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids[order])
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images[order])


def test_a_running_stream_follows_load_state_dict(folder: Path) -> None:
    loader = ImageLoader(ImageFolder(folder, SIZE), 4, num_workers=2)
    stream = loader.stream()
    first = next(stream)
    state = loader.state_dict()
    second = next(stream)
    next(stream)
    loader.load_state_dict(state)
    assert torch.equal(next(stream).ids, second.ids) and not torch.equal(first.ids, second.ids)


def test_a_position_of_another_data_set_is_refused(folder: Path) -> None:
    loader = ImageLoader(ImageFolder(folder, SIZE), 4)
    with pytest.raises(UsageError, match=r"14 samples .* 13; set data.path"):
        loader.load_state_dict({**loader.state_dict(), "num_samples": 14})


def test_augmentation_depends_on_seed_image_and_epoch_alone(folder: Path) -> None:
    dataset = ImageFolder(folder, SIZE, crop="random_resized", flip=True)
    variants = {dataset.load(4, seed=0, epoch=epoch).tobytes() for epoch in range(6)}
    assert len(variants) >= 4  # a 12 x 15 image has few crops: two epochs may agree
    assert np.array_equal(dataset.load(4, seed=0, epoch=2), dataset.load(4, seed=0, epoch=2))
    flipped = ImageFolder(folder, SIZE, flip=True)
    plain = flipped.load_plain(4)
    seen = [flipped.load(4, seed=0, epoch=epoch) for epoch in range(40)]
    mirrored = sum(np.array_equal(pixels, plain[:, :, ::-1]) for pixels in seen)
    assert mirrored + sum(np.array_equal(pixels, plain) for pixels in seen) == 40 and 8 < mirrored < 32


def test_no_threads_are_left_behind(folder: Path) -> None:
    loader = ImageLoader(ImageFolder(folder, SIZE), 2, num_workers=3)
    for batch in loader.stream():
        assert len(batch.ids) == 2
        break
    list(loader)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vadit-data")]


def damage(folder: Path, kind: str) -> Path:
    path = folder / "a" / "02.png"
    whole = path.read_bytes()
    path.unlink()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image at all")
    elif kind == "broken link":
        path.symlink_to(folder / "gone.png")
    elif kind == "thin":
        Image.new("RGB", (1, 3000)).save(path)
    return path


KINDS = ["truncated", "empty", "text", "broken link", "thin"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_named(folder: Path, kind: str) -> None:
    path = damage(folder, kind)
    with pytest.raises(RunError, match=rf"{path} does not decode .*--data.on-error skip"):
        list(ImageLoader(ImageFolder(folder, SIZE), 4, num_workers=2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_skipped_and_counted(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = damage(folder, kind)
    dataset = ImageFolder(folder, SIZE, on_error="skip")
    bad = dataset.paths.index(str(path))
    with caplog.at_level(logging.WARNING):
        ids = ids_of(ImageLoader(dataset, 4, num_workers=2))
    assert len(ids) == 13 and set(ids) == set(range(13)) - {bad}
    assert list(dataset.bad_files) == [str(path)]
    assert "1 images do not decode" in caplog.text and str(path) in caplog.text
    # The replacement is a function of the position, not of the batch or the ranks.
    again = [ids_of(ImageLoader(dataset, 1, 0, rank, 2, num_workers=1)) for rank in range(2)]
    assert [again[position % 2][position // 2] for position in range(13)] == ids


def test_all_images_bad_ends_with_an_error(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("x")
    with pytest.raises(RunError, match=r"none of the 3 images"):
        list(ImageLoader(ImageFolder(tmp_path, SIZE, on_error="skip"), 2, num_workers=2))


def test_in_order_loading_leaves_bad_images_out(folder: Path) -> None:
    path = damage(folder, "text")
    dataset = ImageFolder(folder, SIZE, crop="random", flip=True, on_error="skip")
    bad = dataset.paths.index(str(path))
    batches = list(load_in_order(dataset, range(2, 13), 3, num_workers=2))
    assert ids_of(batches) == [index for index in range(2, 13) if index != bad]
    assert np.array_equal(batches[-1].images[-1].numpy(), dataset.load_plain(12))


def test_unusable_folders_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"data.path is empty"):
        ImageFolder("", SIZE)
    with pytest.raises(UsageError, match=r"data.path .*nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", SIZE)
    with pytest.raises(UsageError, match=r"notes.txt is a file"):
        ImageFolder(folder / "a" / "notes.txt", SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty holds no images"):
        ImageFolder(tmp_path / "empty", SIZE)
    (folder / "d").mkdir()
    with pytest.raises(UsageError, match=r"class folder d holds no images"):
        ImageFolder(folder, SIZE)
    save_picture(folder / "stray.png", 0)
    with pytest.raises(UsageError, match=r"beside its class folders \(such as stray.png\)"):
        ImageFolder(folder, SIZE)


def test_debug_images_need_no_files() -> None:
    dataset = open_images(ImageDataSpec(path="debug:6"), 16)
    batches = list(ImageLoader(dataset, 4, num_workers=1))
    assert [batch.images.shape for batch in batches] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    assert sorted(ids_of(batches)) == list(range(6))
    assert batches[0].images.float().std() > 10
    with pytest.raises(UsageError, match=r"debug:x"):
        open_images(ImageDataSpec(path="debug:x"), 16)
