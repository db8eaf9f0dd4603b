"""The DALI decoder: Pillow's pixels, what it leaves to Pillow, recovery, order, position, an orderly end."""

import io
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import SIDES, encode, jpeg, photo, psnr, turned, write_folder
from launched import LIMIT_S
from PIL import Image

from vadit.images.loader import Decoded, ImageSet, Request
from vadit.images.pillow import decode
from vadit.images.sources.folders import FolderSource
from vadit.images.transforms import CropKind, apply_crop, plan_crop
from vadit.runtime.errors import RunError

pytest.importorskip("nvidia.dali")

from vadit.images import dali
from vadit.images.dali import DaliDecoder, resample
from vadit.images.jpeg import jpeg_area

SIZE = 64
MIN_PSNR = 50  # What photographs keep in dB: Pillow and torch may differ in which side they filter, and round, first.
CROPS: tuple[CropKind, ...] = ("center", "random")
# Sizes without a halving, with one and with two, of even and odd sides.
SIZES = [(120, 90), (160, 128), (161, 129), (301, 259), (90, 140)]
PHOTOS = [photo(number, *size) for number, size in enumerate(SIZES)]


def damaged(data: bytes) -> bytes:
    """A JPEG of sound structure that nobody can decode: its first Huffman table claims impossible codes."""
    place = data.index(b"\xff\xc4") + 5
    bad = data[:place] + b"\xff" * 16 + data[place + 16 :]
    assert jpeg_area(bad) > 0
    with pytest.raises(OSError), Image.open(io.BytesIO(bad)) as image:
        image.load()
    return bad


def image_set(folder: Path, contents: Sequence[bytes], **settings: object) -> ImageSet:
    """Files 00.jpg, 01.jpg, ... of a flat folder."""
    write_folder(folder, {f"{number:02d}.jpg": data for number, data in enumerate(contents)})
    return ImageSet(FolderSource(folder), SIZE, **settings)  # type: ignore[arg-type]


def decode_all(images: ImageSet, requests: Sequence[Request], num_workers: int = 2) -> Decoded:
    with DaliDecoder(images, num_workers) as decoder:
        return decoder.submit(requests)()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """JPEGs of the photographs."""
    return image_set(tmp_path_factory.mktemp("photos"), [encode(image) for image in PHOTOS])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind", CROPS)
def test_photographs_are_cropped_as_by_pillow(photos: ImageSet, kind: CropKind, mirror: bool) -> None:
    requests = [Request(index, kind, seed, mirror) for index in range(len(photos)) for seed in range(4)]
    decoded = decode_all(photos, requests)
    assert not decoded.failures
    assert decoded.pixels.shape == (len(requests), SIZE, SIZE, 3) and decoded.pixels.dtype == torch.uint8
    for pixels, request in zip(decoded.pixels.numpy(), requests, strict=True):
        expected = decode(photos, request)
        assert psnr(pixels, expected) >= MIN_PSNR
        # The bound can tell a window that is off by one pixel, and an image that is not mirrored.
        for axis in (0, 1):
            assert psnr(pixels[1:, 1:], np.roll(expected, 1, axis)[1:, 1:]) < MIN_PSNR - 10
        assert psnr(pixels[:, ::-1], expected) < MIN_PSNR - 10


def test_exif_is_applied_as_by_pillow_or_not_at_all(tmp_path: Path) -> None:
    contents = [turned(np.array(PHOTOS[0]), value) for value in SIDES]
    for exif in ("ignore", "apply"):
        images = image_set(tmp_path / exif, contents, exif=exif)
        requests = [Request(index, "random", 3) for index in range(len(images))]
        for pixels, request in zip(decode_all(images, requests).pixels.numpy(), requests, strict=True):
            assert psnr(pixels, decode(images, request)) >= MIN_PSNR
    clear = Image.new("RGBA", (80, 80), (10, 20, 30, 0))
    laid = image_set(tmp_path / "clear", [encode(clear, "PNG")], alpha="white")
    assert (decode_all(laid, [Request(0)]).pixels == 255).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 30}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_to_the_same_bits(options: dict, mode: str) -> None:
    files = [encode(image.convert(mode), **options) for image in PHOTOS]
    assert [jpeg_area(data) for data in files] == [image.width * image.height for image in PHOTOS]
    pipeline = dali._JpegPipeline(len(files), 1, torch.device("cpu"))
    for data, pixels in zip(files, pipeline.run(files), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(pixels.numpy(), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("size", [(97, 64), (131, 129), (130, 303), (301, 259), (515, 640), (50, 70), (64, 64)])
def test_scaling_follows_pillow(size: tuple[int, int], as_float: bool) -> None:
    image = photo(4, *size)
    for kind in CROPS:
        crop = plan_crop(kind, *size, SIZE, seed=5)
        found = resample(torch.from_numpy(np.array(image)), crop, as_float=as_float)
        assert psnr(found.numpy(), np.asarray(apply_crop(image, crop))) >= MIN_PSNR


def test_halves_and_bounds_of_runs() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 700, 3), dtype=np.uint8)
    for side in range(3, 700):
        image = Image.fromarray(np.ascontiguousarray(noise[:, :side]))
        expected = np.asarray(image.resize((side // 2, 1), Image.Resampling.BOX))
        found = dali._halve(torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2))[0].permute(1, 2, 0)
        assert np.array_equal(found.numpy(), expected), side
    most = dali.MAX_AREA
    areas = {0: most, 1: 5, 2: 0, 4: most - 5, 5: 1, 6: 0}
    assert list(dali._groups(areas)) == [([0], True), ([1, 4], True), ([5], True), ([2, 6], False)]
    assert list(dali._groups({})) == []


def test_only_whole_and_ordinary_jpegs_are_shown_to_dali() -> None:
    data = jpeg(0)
    scan = data.index(b"\xff\xda")
    assert jpeg_area(data) == 120 * 90
    assert jpeg_area(data + b"trailing bytes") == 120 * 90
    assert all(jpeg_area(data[:length]) == 0 for length in range(len(data)))
    middle = (scan + len(data)) // 2
    for marker in (0x01, 0xC0, 0xC4, 0xD8, 0xDA, 0xDB, 0xFB):  # among the coded pixels
        assert jpeg_area(data[:middle] + bytes([0xFF, marker]) + data[middle + 2 :]) == 0, hex(marker)
    many_scans = encode(PHOTOS[0], progressive=True)
    last = many_scans.rindex(b"\xff\xda") + 40
    assert jpeg_area(many_scans) == 120 * 90
    assert jpeg_area(many_scans[:last] + b"\xff\xda\0\x0b" + many_scans[last + 4 :]) == 0
    frame = data.index(b"\xff\xc0")
    for place, value in ((1, 0xC9), (4, 12), (6, 0), (9, 4), (10, ord("R"))):  # coding, bits, height, number, names
        changed = bytearray(data)
        changed[frame + place] = value
        if place == 6:
            changed[frame + 5] = value
        assert jpeg_area(bytes(changed)) == 0, place
    for transform, area in ((0, 0), (1, 120 * 90), (2, 0)):  # Adobe's mark: RGB; Y, Cb and Cr; four inks
        mark = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
        assert jpeg_area(data[:2] + mark + data[2:]) == area
    assert jpeg_area(encode(PHOTOS[0].convert("CMYK"))) == 0
    assert jpeg_area(encode(PHOTOS[0], keep_rgb=True)) == 0
    assert jpeg_area(encode(PHOTOS[0], "PNG")) == jpeg_area(b"") == 0


def test_a_damaged_image_is_named_and_costs_no_other(tmp_path: Path) -> None:
    contents = [jpeg(number) for number in range(12)]
    contents[4] = damaged(contents[4])
    contents[6] = contents[6][:-500]
    contents[9] = b"no image"
    images = image_set(tmp_path, contents)
    (tmp_path / "11.jpg").unlink()
    with DaliDecoder(images, 2) as decoder:
        waits = [decoder.submit([Request(index) for index in range(12)]) for _ in range(4)]  # in flight together
        for wait in waits:
            decoded = wait()
            assert sorted(decoded.failures) == [4, 6, 9, 11]
            for place, error in decoded.failures.items():
                assert isinstance(error, RunError) and f"{place:02d}.jpg" in str(error)
            for place in set(range(12)) - decoded.failures.keys():
                assert psnr(decoded.pixels[place].numpy(), decode(images, Request(place))) >= MIN_PSNR
        again = decoder.submit([Request(0), Request(1)])()  # the pipelines have recovered
        assert not again.failures and torch.equal(again.pixels, decoded.pixels[:2])


def test_pillow_takes_over_where_dali_fails_for_no_reason(photos: ImageSet, monkeypatch, caplog) -> None:
    requests = [Request(index) for index in range(len(photos))]
    expected = decode_all(photos, requests)

    def fail(pipeline: object, jpegs: object) -> None:
        raise RuntimeError("out of some resource")

    monkeypatch.setattr(dali._JpegPipeline, "run", fail)
    with caplog.at_level(logging.WARNING):
        decoded = decode_all(photos, requests * 3)
    assert not decoded.failures and torch.equal(decoded.pixels, expected.pixels.repeat(3, 1, 1, 1))
    assert len(caplog.messages) == 1 and "out of some resource" in caplog.text and "00.jpg" in caplog.text


def test_pixels_depend_on_the_request_alone(photos: ImageSet) -> None:
    requests = [Request(place % 5, CROPS[place // 2 % 2], place, bool(place % 2)) for place in range(37)]
    whole = decode_all(photos, requests).pixels
    with DaliDecoder(photos, 3) as decoder:
        waits = [decoder.submit(requests[start : start + 5]) for start in range(0, 37, 5)]  # the last one is short
        assert torch.equal(torch.cat([wait().pixels for wait in waits]), whole)
        assert decoder.submit([])().pixels.shape == (0, SIZE, SIZE, 3)
    assert torch.equal(decode_all(photos, requests, num_workers=1).pixels, whole)


def test_results_stay_what_they_are_and_batches_may_be_dropped(photos: ImageSet) -> None:
    before = set(threading.enumerate())
    with DaliDecoder(photos, 2) as decoder:
        first = decoder.submit([Request(0)] * 8)().pixels
        copy = first.clone()
        for _ in range(20):
            decoder.submit([Request(1)] * 6)
        assert torch.equal(decoder.submit([Request(0)] * 8)().pixels, copy) and torch.equal(first, copy)
        for _ in range(20):
            decoder.submit([Request(1)] * 6)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("vadit-data")]


def test_the_interpreter_ends_with_batches_in_flight(photos: ImageSet) -> None:
    program = f"""
from vadit.images.sources.folders import FolderSource
from vadit.images.loader import ImageLoader, ImageSet, Request
from vadit.images.dali import DaliDecoder, DaliDecoder
images = ImageSet(FolderSource({photos.source.name!r}), 32)
stream = ImageLoader(images, 4, decoder=lambda: DaliDecoder(images, 2)).stream()
next(stream)
decoder = DaliDecoder(images, 2)
waits = [decoder.submit([Request(0)] * 16) for _ in range(8)]
print("end")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 0 and ended.stdout == "end\n" and not ended.stderr, ended.stderr
