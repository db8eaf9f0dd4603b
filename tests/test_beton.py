"""The .beton format: read what FFCV writes, write what FFCV reads, resume a killed writer."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beton_files import COUNT, decoded, picture, without_checksums, write

from vadit.images.sources.beton import MIN_PAGE_SIZE, BetonFile, BetonSource, EncodedImage
from vadit.images.sources.beton_writer import BetonWriter, encode_image
from vadit.runtime.errors import RunError


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


@pytest.mark.parametrize("torn", [0, 1, 7, 200, "a line", "all but the first", "all", "lost byte"])
def test_a_killed_writer_is_resumed(tmp_path: Path, torn: Any) -> None:
    """A kill may leave only a part of what was written last."""
    whole, path = tmp_path / "whole.beton", tmp_path / "resumed.beton"
    options: Any = {"max_samples": 40, "page_size": MIN_PAGE_SIZE, "settings": {"size": 280}}
    with BetonWriter(whole, **options) as writer:
        fill(writer, 30)
        writer.finish({"size": 280})
    with BetonWriter(path, **options) as writer:
        fill(writer, 23)
    partial, journal = path.with_name("resumed.beton.partial"), path.with_name("resumed.beton.partial.journal")
    assert not path.exists() and partial.exists()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3  # the settings, two pages
    if torn == "lost byte":  # the last of an image, before the page's filling
        last = 7 * 252_032 + 300 * 280 * 3
        os.truncate(partial, partial.stat().st_size - MIN_PAGE_SIZE + last - 1)
    elif isinstance(torn, int):
        os.truncate(journal, journal.stat().st_size - torn)
    else:
        journal.write_bytes(b"".join(lines[: {"a line": 2, "all but the first": 1, "all": 0}[torn]]))
    with BetonWriter(path, **options) as writer:
        assert writer.done == {0: 17, "all but the first": 0, "all": 0}.get(torn, 9)
        fill(writer, 30)
        writer.finish({"size": 280})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["resumed.beton", "whole.beton"]
    assert path.read_bytes() == whole.read_bytes() and BetonSource(path).labels.tolist() == [*range(5), *range(6, 30)]


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", max_samples=1, page_size=MIN_PAGE_SIZE) as writer:
        for image in (encode_image(picture(0, 1000, 1000), "raw"), EncodedImage("jpg", 2, 2, b"")):
            with pytest.raises(ValueError, match="do not fit a page"):
                writer.append(image, 0)
        with pytest.raises(RunError, match="no samples"):
            writer.finish()
        writer.append(encode_image(picture(0), "raw"), 0)
        with pytest.raises(ValueError, match="max_samples"):
            writer.append(encode_image(picture(0), "raw"), 0)
