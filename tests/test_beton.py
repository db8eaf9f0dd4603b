"""The .beton format: read what FFCV writes, write what FFCV reads, resume a killed writer."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beton_files import COUNT, decoded, picture, without_checksums, write

from vadit.images.beton import MIN_PAGE_SIZE, BetonFile, BetonSource, EncodedImage
from vadit.images.beton_writer import BetonWriter, encode_image
from vadit.runtime.errors import RunError, UsageError


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("beton") / "images.beton")


@pytest.fixture(scope="module")
def plain(beton: Path) -> Path:
    return without_checksums(beton)


def test_images_come_back(beton: Path, plain: Path) -> None:
    source, bare = BetonSource(beton), BetonSource(plain)
    assert len(source) == len(bare) == COUNT and source.file.notes["size"] == 16
    assert source.classes == ["cat", "dog", "eel"] and bare.classes == ["0", "1", "2"]
    assert source.labels.tolist() == bare.labels.tolist() == [number % 3 for number in range(COUNT)]
    assert source.describe(4) == f"{beton}:4"
    for number in range(COUNT):
        original = picture(number, 20 + number % 4)
        assert (source.widths[number], source.heights[number]) == original.size
        assert source.read(number) == bare.read(number)
        if number % 2 == 0:
            assert np.array_equal(decoded(source, number), np.asarray(original))
        else:
            assert source.read(number) == encode_image(original, "jpg").data
    assert not list(beton.parent.glob("*.partial*"))


def test_ffcv_reads_what_we_write(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    path = tmp_path / "images.beton"
    with BetonWriter(path, max_samples=20, page_size=MIN_PAGE_SIZE) as writer:
        for number in range(7):
            writer.append(encode_image(picture(number), "raw"), 100 + number)
        writer.finish()
    num_threads = torch.get_num_threads()
    loader = Loader(str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
    batches = [[part.clone() for part in batch] for batch in loader]
    torch.set_num_threads(num_threads)
    del loader
    gc.collect()  # a second Loader changes one of numba's types, and with it what the first would free
    images, labels, checksums = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(images, torch.stack([torch.tensor(np.asarray(picture(number))) for number in range(7)]))
    assert labels.flatten().tolist() == [100 + number for number in range(7)]
    assert checksums.flatten().tolist() == BetonFile(path).rows["crc32"].tolist()
    reader, ours = Reader(str(path)), BetonFile(path)
    assert reader.field_names == [field.name for field in ours.fields] == ["image", "label", "crc32"]
    assert reader.metadata.tobytes() == ours.rows.tobytes()


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion", "smart"])
def test_we_read_what_ffcv_writes(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Pictures:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.asarray(picture(index, 20 + index)), index % 5

    path = tmp_path / "images.beton"
    field = RGBImageField(write_mode=mode, smart_threshold=20 * 16 * 3 + 100, jpeg_quality=95)
    DatasetWriter(str(path), {"image": field, "label": IntField()}, MIN_PAGE_SIZE, num_workers=2).from_indexed_dataset(
        Pictures(), chunksize=3
    )
    source = BetonSource(path)
    assert len(source) == 8 and source.labels.tolist() == [index % 5 for index in range(8)]
    expected = {"raw": [0] * 8, "jpg": [1] * 8, "smart": [0] * 3 + [1] * 5}.get(mode, source.is_jpeg.tolist())
    assert source.is_jpeg.tolist() == expected
    for index in range(8):
        difference = np.abs(decoded(source, index).astype(int) - np.asarray(picture(index, 20 + index)))
        assert difference.max() == 0 if not source.is_jpeg[index] else difference.mean() < 20


def fill(writer: BetonWriter, stop: int) -> None:
    """Items 0 to stop: big pictures (eight to a page); item 5 is skipped."""
    for number in range(writer.done, stop):
        if number == 5:
            writer.skip("five.png", "no image")
        else:
            writer.append(encode_image(picture(number, 300, 280), "raw"), number)


@pytest.mark.parametrize("damage", ["none", "torn line", "lost page"])
def test_a_killed_writer_is_resumed(tmp_path: Path, damage: str) -> None:
    whole, path = tmp_path / "whole.beton", tmp_path / "resumed.beton"
    options: Any = {"max_samples": 40, "page_size": MIN_PAGE_SIZE, "settings": {"size": 280}}
    with BetonWriter(whole, **options) as writer:
        fill(writer, 30)
        writer.finish({"classes": [str(label) for label in range(30)]})
    with BetonWriter(path, **options) as writer:
        fill(writer, 23)
    partial, journal = path.with_name("resumed.beton.partial"), path.with_name("resumed.beton.partial.journal")
    assert not path.exists() and partial.exists()
    if damage == "torn line":
        journal.write_bytes(journal.read_bytes()[:-7])
    elif damage == "lost page":
        os.truncate(partial, partial.stat().st_size - 10)
    with BetonWriter(path, **options) as writer:
        done = writer.done
        assert 0 < done < 23 and writer.skipped == {"five.png": "no image"}
        fill(writer, 30)
        writer.finish({"classes": [str(label) for label in range(30)]})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["resumed.beton", "whole.beton"]
    source, expected = BetonSource(path), BetonSource(whole)
    assert len(source) == len(expected) == 29 and source.labels.tolist() == expected.labels.tolist()
    assert all(source.read(index) == expected.read(index) for index in range(29))
    if damage == "none":  # pages were filled alike, so the files are alike
        assert path.read_bytes() == whole.read_bytes()


def test_parts_of_other_settings_and_of_other_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.beton"
    with BetonWriter(path, max_samples=9, settings={"size": 256}) as writer:
        with pytest.raises(UsageError, match="another process"):
            BetonWriter(path, max_samples=9, settings={"size": 256})
        writer.skip("a.png", "no image")
    for options in ({"max_samples": 9, "settings": {"size": 512}}, {"max_samples": 10, "settings": {"size": 256}}):
        with pytest.raises(UsageError, match=r"made with (settings.size|max_samples) "):
            BetonWriter(path, **options)  # type: ignore[arg-type]


def test_a_full_disk_is_told_and_the_writer_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "images.beton"
    options: Any = {"max_samples": 40, "page_size": MIN_PAGE_SIZE}
    with BetonWriter(path, **options) as writer:
        fill(writer, 12)
        with monkeypatch.context() as patch, pytest.raises(RunError, match=r"images\.beton.*No space left"):
            patch.setattr(os, "fsync", full)
            fill(writer, 30)
    with BetonWriter(path, **options) as writer:
        assert 0 < writer.done <= 12
        fill(writer, 12)
        writer.finish()
    assert len(BetonSource(path)) == 11


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", max_samples=1, page_size=MIN_PAGE_SIZE) as writer:
        with pytest.raises(RunError, match="does not fit"):
            writer.append(encode_image(picture(0, 1000, 1000), "raw"), 0)
        for image in (EncodedImage("raw", 2, 2, b"x"), EncodedImage("jpg", 2, 2, b"")):
            with pytest.raises(ValueError, match="bytes for 2 x 2 pixels"):
                writer.append(image, 0)
        with pytest.raises(RunError, match="no samples"):
            writer.finish()
        writer.append(encode_image(picture(0), "raw"), 0)
        with pytest.raises(ValueError, match="max_samples"):
            writer.append(encode_image(picture(0), "raw"), 0)
