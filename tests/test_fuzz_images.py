"""Damaged image files: every decoder shows what Pillow shows, or refuses by name (see mutations.py).

A bare JPEG has no checksum: the pixels of a damaged one are whatever libjpeg makes of it, but the same everywhere. DALI
and FFCV could end the whole process: they run in one of their own that says which case it is at.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import encode, jpeg, photo, psnr
from mutations import BLOCK, NUM_NATIVE_CASES, SECONDS_PER_BLOCK, Case, blocks, cases, in_time
from PIL import Image

from vadit.images.beton import BetonSource, EncodedImage
from vadit.images.beton_writer import BetonWriter
from vadit.images.folders import FolderSource
from vadit.images.loader import Decoded, ImageSet, Request
from vadit.images.pillow import pillow_decoder
from vadit.images.transforms import center_crop, to_rgb

SIZE = 32
JPEG_OPTIONS: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}]


def shown(data: bytes) -> np.ndarray | None:
    """What the file shows by Pillow and the centre crop; None where it shows nothing."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.asarray(center_crop(to_rgb(image), SIZE))
    except Exception:  # Pillow's decoders raise almost anything
        return None


def jpeg_cases(start: int) -> list[Case]:
    """Changes of small JPEGs: quantisation, frame and Huffman tables in front, then entropy-coded data."""
    number = start // BLOCK
    data = jpeg(number, 72, 48, **JPEG_OPTIONS[number % len(JPEG_OPTIONS)])
    scan = data.index(b"\xff\xda")
    return list(cases("jpeg", start, data, [("its headers", 2, scan), ("its data", scan + 12, len(data))]))


@blocks("jpeg")
def test_jpegs_show_what_pillow_shows(tmp_path: Path, start: int) -> None:
    decoded, order = decode_all(tmp_path, jpeg_cases(start), ".jpg")
    expected = [shown(case.data) for case in order]
    assert sorted(decoded.failures) == [place for place, pixels in enumerate(expected) if pixels is None]
    for place, (case, pixels) in enumerate(zip(order, expected, strict=True)):
        if pixels is None:
            assert case.name in str(decoded.failures[place])
        else:
            assert np.array_equal(decoded.pixels[place], pixels), f"{case.name} ({case.change})"


@blocks("png")
def test_pngs_show_what_they_did(tmp_path: Path, start: int) -> None:
    """A PNG has checksums, which Pillow alone does not all compare: refused, or nothing has changed."""
    data = encode(photo(start, 40, 40), "PNG")
    body = data.index(b"IDAT")
    end = data.index(b"IEND") - 8
    # Pillow stops as soon as it has all rows, and takes what is wrong in the last of them.
    regions = [("its header", 8, body), ("its data", body + 4, end), ("the end of its data", end - 40, end)]
    found = list(cases("png", start, data, regions))
    decoded, order = decode_all(tmp_path, found, ".png")
    assert decoded.failures
    for place, case in enumerate(order):
        if place in decoded.failures:
            assert case.name in str(decoded.failures[place])
        else:
            assert np.array_equal(decoded.pixels[place], shown(data)), f"{case.name} ({case.change})"


def decode_all(root: Path, found: list[Case], suffix: str) -> tuple[Decoded, list[Case]]:
    """What the loader makes of the cases as files of one folder, in one batch, and their order in it."""
    for case in found:
        (root / f"{case.name}{suffix}").write_bytes(case.data)
    source = FolderSource(root)
    by_name = {case.name: case for case in found}
    results: list[Decoded] = []

    def work() -> None:
        with pillow_decoder(ImageSet(source, SIZE), 2)() as decoder:
            results.append(decoder.submit([Request(index) for index in range(len(source))])())

    in_time(work)
    return results[0], [by_name[Path(path).stem] for path in source.paths]


# ------------------------------------------------------------------------------------------------ DALI and FFCV


def native_cases(mode: str) -> list[Case]:
    """Changes of JPEGs, most of them in the entropy-coded data and the tables that decode it."""
    found: list[Case] = []
    for start in range(0, NUM_NATIVE_CASES[mode], BLOCK):
        number = start // BLOCK
        options: dict[str, Any] = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 4}][
            number % 4
        ]
        data = jpeg(number, 48, SIZE, **options)
        tables, scan = data.index(b"\xff\xdb"), data.index(b"\xff\xda")
        regions = [("its data", scan + 12, len(data)), ("its tables", tables, scan), ("its data", scan + 12, len(data))]
        found += cases(f"{mode}-jpeg", start, data, regions)
    return found


@pytest.mark.parametrize(("mode", "module"), [("dali", "nvidia.dali"), ("ffcv", "ffcv")])
def test_native_decoders_show_what_pillow_shows(tmp_path: Path, mode: str, module: str) -> None:
    """In a process of its own, alone and all in one batch. Nearer than 35 dB, and FFCV exactly; or refused by name."""
    pytest.importorskip(module)
    found = native_cases(mode)
    if mode == "dali":
        for number, case in enumerate(found):
            (tmp_path / f"{number:04d}.jpg").write_bytes(case.data)
        path = tmp_path
    else:
        # A beton whose checksums fit: what is wrong was wrong when it was written.
        path = tmp_path / "images.beton"
        with BetonWriter(path, max_samples=len(found)) as writer:
            for case in found:
                writer.append(EncodedImage("jpg", 48, SIZE, case.data), 0)
            writer.finish({"classes": ["all"]})
    alone, together = native_pixels(mode, path, found)
    refused = 0
    for number, case in enumerate(found):
        where = f"{case.name} ({case.change})"
        expected = shown(case.data)
        assert alone[number] == together[number] or (alone[number] is not None and together[number] is not None), where
        if alone[number] is None:
            refused += 1
            # before FFCV sees a JPEG, its own size must be found and be the table's
            assert expected is None or (mode == "ffcv" and "its tables" in case.change), where
            continue
        for pixels in (alone[number], together[number]):
            assert expected is not None, f"{where}: shown, though Pillow refuses it"
            near = psnr(np.array(pixels, np.uint8), expected)
            assert near == float("inf") if mode == "ffcv" else near >= 35, f"{where}: {near} dB"
    assert 0 < refused < len(found)


def native_pixels(mode: str, path: Path, found: list[Case]) -> tuple[list[Any], list[Any]]:
    """Pixels of every case (None: refused) alone and in one batch; a crash or a hang fails with the case's name."""
    script = Path(__file__)
    log = path.parent / f"{mode}.log"
    with log.open("w") as output:
        try:
            command = [sys.executable, str(script), mode, str(path)]
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=SECONDS_PER_BLOCK,
                check=False,
                env=os.environ | {"PYTHONSAFEPATH": ""},  # the script imports what lies beside it
            )
            ending = f"ended with {done.returncode}: {done.stderr.decode(errors='replace')[-1000:]}"
            whole = done.returncode == 0
        except subprocess.TimeoutExpired:
            ending, whole = f"hangs ({SECONDS_PER_BLOCK} s)", False
    lines = log.read_text().splitlines()
    if not whole:
        begun = [int(line.split()[1]) for line in lines if line.startswith("begin")]
        place = f"case {found[begun[-1]].name} ({found[begun[-1]].change})" if begun else "its start"
        pytest.fail(f"{mode} {ending} at {place}")
    alone, together = (json.loads(line.partition(" ")[2]) for line in lines[-2:])
    return alone, together


def native_worker(mode: str, path: str) -> None:
    """Decode every image of a folder or beton; said on the way: which one is begun."""
    if mode == "dali":
        from vadit.images.dali import dali_decoder

        images = ImageSet(FolderSource(path), SIZE)
        start = dali_decoder(images, 2, "cpu")
    else:
        from vadit.images.ffcv import FfcvImageLoader

        images = ImageSet(BetonSource(path), SIZE)
        start = FfcvImageLoader(images, 4, num_workers=2)._decoder
    with start() as decoder:
        alone = []
        for index in range(len(images)):
            print("begin", index, flush=True)
            alone += pixels_of(images, decoder.submit([Request(index)])(), [index])
        indices = list(range(len(images)))
        together = pixels_of(images, decoder.submit([Request(index) for index in indices])(), indices)
    print("alone", json.dumps(alone))
    print("together", json.dumps(together))


def pixels_of(images: ImageSet, decoded: Decoded, indices: list[int]) -> list[Any]:
    for place, error in decoded.failures.items():
        assert images.source.describe(indices[place]) in str(error), error
    return [None if place in decoded.failures else decoded.pixels[place].tolist() for place in range(len(indices))]


if __name__ == "__main__":
    native_worker(*sys.argv[1:])
