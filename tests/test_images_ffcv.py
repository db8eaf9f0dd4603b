"""FFCV's loader: pixels and order of every other loader, quasi-random order by pages, bad images, threads."""

import importlib.util
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import SIDES, turned
from launched import LIMIT_S
from PIL import Image

from vadit.images.ffcv import ffcv_decoder, why_not
from vadit.images.loader import ImageLoader, ImageSet, Request
from vadit.images.pillow import pillow_decoder
from vadit.images.sources.beton import MIN_PAGE_SIZE, BetonSource, EncodedImage
from vadit.images.sources.beton_writer import BetonWriter, encode_image
from vadit.images.sources.folders import DebugSource
from vadit.images.sources.page_order import PageOrder
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.stream import sample_ids

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
SIZE = 40
COUNT = 23


def picture(number: int) -> Image.Image:
    """Smooth, with noise; the short side is SIZE, of every second one the width."""
    generator = np.random.default_rng(number)
    shape = (SIZE, SIZE + number % 9) if number % 2 else (SIZE + number % 7, SIZE)
    smooth = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(smooth.resize(shape[::-1], Image.Resampling.BICUBIC)) + generator.normal(0, 6, (*shape, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return EncodedImage("jpg", image.width, image.height, buffer.getvalue())


def encoded(number: int) -> EncodedImage:
    """Raw pixels, and JPEGs of each kind of subsampling, progressive, grey."""
    image = picture(number)
    return [
        encode_image(image, "raw"),
        encode_image(image, "jpg"),
        jpeg(image, quality=90),  # 4:2:0
        jpeg(image, quality=60, subsampling=1),
        jpeg(image, quality=80, progressive=True),
        jpeg(image.convert("L"), quality=85),
    ][number % 6]


def write(path: Path, images: Iterable[EncodedImage]) -> Path:
    with BetonWriter(path, max_samples=1000, page_size=MIN_PAGE_SIZE) as writer:
        for number, image in enumerate(images):
            writer.append(image, number % 4)
        writer.finish({"classes": ["a", "b", "c", "d"]})
    return path


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ffcv") / "images.beton", map(encoded, range(COUNT)))


def ffcv_loader(images: ImageSet, batch_size: int, seed: int = 0, order: str = "random") -> ImageLoader:
    pages = PageOrder(images.source) if order == "quasi_random" else None  # type: ignore[arg-type]
    return ImageLoader(images, batch_size, seed, decoder=ffcv_decoder(images, 2), order=pages)


@pytest.fixture(scope="module")
def shared(beton: Path) -> ImageLoader:
    return ffcv_loader(ImageSet(BetonSource(beton), SIZE, flip=True), 5, seed=3)


@pytest.fixture
def loader(shared: ImageLoader) -> ImageLoader:
    """One for all tests, since each compiles; at its start, and with the settings that the fixture gave it."""
    shared.images_seen = 0
    shared.images.crop, shared.images.on_error, shared.images.bad = "center", "raise", {}
    return shared


def pillow(beton: Path, crop: Any = "center") -> ImageLoader:
    images = ImageSet(BetonSource(beton), SIZE, crop, flip=True)
    return ImageLoader(images, 5, seed=3, decoder=pillow_decoder(images, 2))


@needs_ffcv
def test_exif_is_applied_as_by_pillow_or_not_at_all(tmp_path: Path) -> None:
    files = [turned(np.asarray(picture(number)), value) for number, value in enumerate(SIDES)]
    sizes = [Image.open(io.BytesIO(data)).size for data in files]
    images = [EncodedImage("jpg", *size, data) for size, data in zip(sizes, files, strict=True)]
    path = write(tmp_path / "a.beton", images)
    requests = [Request(index, "random", 5, mirror=index % 2 == 1) for index in range(len(files))]
    for exif in ("ignore", "apply"):
        opened = ImageSet(BetonSource(path), SIZE, exif=exif)  # type: ignore[arg-type]
        found = []
        for decoder in (ffcv_decoder(opened, 2), pillow_decoder(opened, 2)):
            with decoder() as active:
                found.append(active.submit(requests)().pixels)
        assert torch.equal(*found), exif


@needs_ffcv
@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_are_pillows(loader: ImageLoader, beton: Path, crop: Any) -> None:
    loader.images.crop = crop
    mirrored = 0
    for batch, expected in zip(islice(loader.stream(), 14), pillow(beton, crop).stream(), strict=False):
        assert batch.images.shape == (5, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.ids, expected.ids) and torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.images, expected.images)
        requests = loader.images.requests(batch.ids, seed=3, epoch=0)
        mirrored += sum(request.mirror for request in requests)
    assert 0 < mirrored < 70 and loader.images_seen == 70


@needs_ffcv
def test_the_interpreter_ends_while_an_iterator_is_open(tmp_path: Path) -> None:
    path = write(tmp_path / "raw.beton", (encode_image(picture(number), "raw") for number in range(8)))
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(2)\n"
        "from vadit.images.sources.beton import BetonSource\n"
        "from vadit.images.loader import ImageLoader, ImageSet\n"
        "from vadit.images.ffcv import ffcv_decoder\n"
        f"images = ImageSet(BetonSource(sys.argv[1]), {SIZE})\n"
        "batches = ImageLoader(images, 5, decoder=ffcv_decoder(images, 2)).stream()\n"
        "print(next(batches).images.shape[0], torch.get_num_threads())\n"
    )
    # Interpreted, not compiled: that takes most of the time, and the threads are the same.
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=LIMIT_S, env=environment
    )
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["5", "2"], "")


def damaged(path: Path, index: int) -> Path:
    source = BetonSource(path)
    with open(path, "r+b") as file:
        file.seek(int(source.ptrs[index]) + int(source.sizes[index]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    return path


@needs_ffcv
@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_a_bad_image_stops_the_run_or_gives_its_place_to_the_next(beton: Path, tmp_path: Path, order: Any) -> None:
    places = torch.arange(COUNT)
    if order == "random":
        ((_, ids),) = sample_ids(places, COUNT, 1)
    else:
        ids = PageOrder(BetonSource(beton)).ids(places, 0, 1)
    expected = ids.tolist()
    bad = expected[4], expected[9]
    path = Path(shutil.copy(beton, tmp_path / "bad.beton"))
    for index in bad:
        damaged(path, index)
    images = ImageSet(BetonSource(path), SIZE, on_error="raise", max_bad_share=0.2)
    loader = ffcv_loader(images, COUNT, seed=1, order=order)
    pytest.raises(RunError, next, iter(loader)).match(rf"sample {bad[0]} of .*bad\.beton fails its checksum")
    images.on_error = "skip"
    (batch,) = loader
    replaced = list(expected)
    replaced[4], replaced[9] = expected[5], expected[10]
    assert batch.ids.tolist() == replaced and sorted(images.bad) == sorted(bad)
    loader.load_state_dict({"seed": 1, "images_seen": 0})
    (again,) = loader
    assert torch.equal(again.images, batch.images) and torch.equal(again.images[5], batch.images[4])
    with pillow_decoder(images, 1)() as decoder:
        whole = decoder.submit([Request(index) for index in replaced])().pixels
    assert torch.equal(batch.images, whole.permute(0, 3, 1, 2))
    images.max_bad_share = 0.0
    images.bad = {}
    loader.load_state_dict({"seed": 1, "images_seen": 0})
    pytest.raises(RunError, next, iter(loader)).match("max_bad_share")


@needs_ffcv
def test_pillow_judges_what_turbojpeg_does_not_like(tmp_path: Path) -> None:
    """Files without checksums (FFCV's own): a truncated JPEG is refused, one with a harmless flaw is not."""
    whole = encode_image(picture(0), "jpg")
    data = bytes(whole.data)
    short = EncodedImage("jpg", whole.width, whole.height, data[: len(data) // 2])
    flawed = EncodedImage("jpg", whole.width, whole.height, data[:-2] + b"abc" + data[-2:])
    path = write(tmp_path / "odd.beton", [whole, short, flawed])
    images = ImageSet(BetonSource(path), SIZE, on_error="skip", max_bad_share=0.5)
    loader = ffcv_loader(images, 3)
    (batch,) = loader
    assert sorted(images.bad) == [1] and "does not decode" in str(images.bad[1]) and 1 not in batch.ids.tolist()
    plain = ImageSet(BetonSource(path), SIZE, on_error="skip", max_bad_share=0.5)
    (expected,) = ImageLoader(plain, 3, decoder=pillow_decoder(plain, 1))
    assert torch.equal(batch.ids, expected.ids) and torch.equal(batch.images, expected.images)
    os.truncate(path, MIN_PAGE_SIZE + 10)
    pytest.raises(RunError, next, iter(loader)).match("cut short while it was in use")


def test_what_ffcv_cannot_load_is_told(beton: Path, monkeypatch) -> None:
    source = BetonSource(beton)
    for images, reason in (
        (ImageSet(DebugSource(4, SIZE), SIZE), "debug:4 is none"),
        (ImageSet(source, SIZE - 1), rf"short side is {SIZE - 1} pixels, and .*images\.beton:0 has"),
    ):
        pytest.raises(UsageError, ffcv_decoder, images, 2).match(rf"{reason}.*; set --data.loader torch")
    if importlib.util.find_spec("ffcv"):
        monkeypatch.setattr("importlib.metadata.version", lambda name: "1.1.0")
        assert "ffcv 1.1.0 is installed, and this loader is made for 1.0.2" in why_not(ImageSet(source, SIZE))
    monkeypatch.setitem(sys.modules, "ffcv.libffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert "pip install 'vadit[ffcv]'" in why_not(ImageSet(source, SIZE))


PAGED = 37
WINDOW = 3  # Pages; 12 hold three images each, the last one a single image.


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> BetonSource:
    path = tmp_path_factory.mktemp("paged") / "images.beton"
    with BetonWriter(path, max_samples=PAGED, page_size=MIN_PAGE_SIZE) as writer:
        for _ in range(PAGED):
            writer.append(EncodedImage("raw", 480, 480, bytes(480 * 480 * 3)), 0)
        writer.finish()
    return BetonSource(path)


def page_order(source: BetonSource) -> PageOrder:
    return PageOrder(source, window_bytes=WINDOW * MIN_PAGE_SIZE)


def windows_of(source: BetonSource, ids: np.ndarray) -> list[list[int]]:
    """The places of an epoch in stretches that hold no more than WINDOW pages."""
    pages = source.ptrs[ids] // MIN_PAGE_SIZE
    stretches, begin = [], 0
    while begin < len(ids):
        end = begin + 1
        while end < len(ids) and len(set(pages[begin : end + 1])) <= WINDOW:
            end += 1
        stretches.append(list(range(begin, end)))
        begin = end
    return stretches


def test_an_epoch_takes_each_page_once_and_is_a_function_of_the_place(paged: BetonSource) -> None:
    order = page_order(paged)
    epochs = [order.ids(torch.arange(PAGED), epoch, seed=5).numpy() for epoch in range(3)]
    for ids in epochs:
        assert sorted(ids) == list(range(PAGED))
        windows = [set(paged.ptrs[ids[places]] // MIN_PAGE_SIZE) for places in windows_of(paged, ids)]
        assert [len(window) for window in windows] == [3, 3, 3, 3, 1]
        assert sum(len(window) for window in windows) == len(set().union(*windows))
    # pages are mixed inside a window, and every epoch and seed has an order of its own
    steps = [abs(int(one) - int(other)) for ids in epochs for one, other in itertools.pairwise(ids[:9])]
    assert max(steps) > 2
    others = [*epochs, order.ids(torch.arange(PAGED), 0, seed=6).numpy()]
    assert len({tuple(ids) for ids in others}) == 4 and len({tuple(ids - ids // 3 * 3) for ids in others}) == 4
    order, other = page_order(paged), page_order(paged)
    whole = order.ids(torch.arange(PAGED), 4, seed=5)
    for rank in range(3):
        assert torch.equal(other.ids(torch.arange(rank, PAGED, 3), 4, seed=5), whole[rank::3])
    assert [int(order.ids(torch.tensor([place]), 4, seed=5)[0]) for place in range(PAGED)] == whole.tolist()


def test_reading_ahead_asks_for_the_window_and_the_next_one(paged: BetonSource, monkeypatch) -> None:
    order = page_order(paged)
    asked: list[int] = []

    def will_read(ptr: int, size: int) -> None:
        assert size == MIN_PAGE_SIZE and ptr % size == 0
        asked.append(ptr // size)

    monkeypatch.setattr(paged.file, "will_read", will_read)
    ids = order.ids(torch.arange(PAGED), 0, 5).numpy()
    stretches = windows_of(paged, ids)
    windows = [sorted(set((paged.ptrs[ids[places]] // MIN_PAGE_SIZE).tolist())) for places in stretches]

    def wait(count: int) -> list[list[int]]:
        for _ in range(100 * LIMIT_S):  # what was not asked for yet when the block ends is given up
            if len(asked) >= count:
                break
            threading.Event().wait(0.01)
        parts, begin = [], 0
        while begin < len(asked):
            parts.append(sorted(asked[begin : begin + WINDOW]))
            begin += WINDOW
        return parts

    with order.reading_ahead() as touch:
        last = stretches[0][-1]
        touch(torch.arange(0, last + 1), 0, 5)  # the first window alone
        assert wait(6) == windows[:2]
        touch(torch.arange(last, last + 1), 0, 5)  # nothing new
        touch(torch.arange(last + 1, last + 2), 0, 5)
        assert wait(9) == windows[:3]
        touch(torch.arange(last, PAGED), 0, 5)  # all others, and none beyond
        assert wait(13) == windows
        touch(torch.arange(0, 1), 1, 5)  # another epoch
        wait(19)
    assert len(asked) == 19
