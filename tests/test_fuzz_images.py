"""Damaged image files: every decoder shows what Pillow shows, or refuses by name (see mutations.py).

A bare JPEG has no checksum: the pixels of a damaged one are whatever libjpeg makes of it, but the same everywhere. DALI
and FFCV could end the whole process: they run in one of their own that says which case it is at.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import center_crop, encode, jpeg, photo, psnr
from mutations import BLOCK, NUM_NATIVE_CASES, SECONDS_PER_BLOCK, Case, blocks, cases
from PIL import Image

from vadit.images.loader import ImageSet, Request
from vadit.images.pillow import pillow_decoder
from vadit.images.sources.beton import BetonSource, EncodedImage
from vadit.images.sources.beton_writer import BetonWriter
from vadit.images.sources.folders import FolderSource
from vadit.images.transforms import to_rgb

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


@blocks("png")
def test_pngs_show_what_they_did(tmp_path: Path, start: int) -> None:
    """A PNG has checksums, which Pillow alone does not all compare: refused, or nothing has changed."""
    data = encode(photo(start, 40, 40), "PNG")
    body, end = data.index(b"IDAT"), data.index(b"IEND") - 8
    # Pillow stops as soon as it has all rows, and takes what is wrong in the last of them.
    regions = [("its header", 8, body), ("its data", body + 4, end), ("the end of its data", end - 40, end)]
    found = {f"{case.name}.png": case for case in cases("png", start, data, regions)}
    for name, case in found.items():
        (tmp_path / name).write_bytes(case.data)
    images = ImageSet(FolderSource(tmp_path), SIZE)
    with pillow_decoder(images, 2)() as decoder:
        decoded = decoder.submit([Request(index) for index in range(len(images))])()
    assert decoded.failures
    for place in range(len(images)):
        name = Path(images.source.describe(place)).name
        if place in decoded.failures:
            assert name in str(decoded.failures[place])
        else:
            assert np.array_equal(decoded.pixels[place], shown(data)), f"{name} ({found[name].change})"


# --- DALI and FFCV
def native_cases(mode: str) -> list[Case]:
    """Changes of JPEGs, most of them in the entropy-coded data and the tables that decode it."""
    found: list[Case] = []
    for start in range(0, NUM_NATIVE_CASES[mode], BLOCK):
        number = start // BLOCK
        data = jpeg(number, 48, SIZE, **JPEG_OPTIONS[number % len(JPEG_OPTIONS)])
        tables, scan = data.index(b"\xff\xdb"), data.index(b"\xff\xda")
        regions = [("its data", scan + 12, len(data)), ("its tables", tables, scan), ("its data", scan + 12, len(data))]
        found += cases(f"{mode}-jpeg", start, data, regions)
    return found


@pytest.mark.parametrize(("mode", "module"), [("dali", "nvidia.dali"), ("ffcv", "ffcv")])
def test_native_decoders_show_what_pillow_shows(tmp_path: Path, mode: str, module: str) -> None:
    """In a process of its own, alone and all in one batch. Nearer than 35 dB, and FFCV exactly; or refused by name."""
    pytest.importorskip(module)
    found = native_cases(mode)
    path = tmp_path
    if mode == "dali":
        for number, case in enumerate(found):
            (tmp_path / f"{number:04d}.jpg").write_bytes(case.data)
    else:
        # A beton whose checksums fit: what is wrong was wrong when it was written.
        path = tmp_path / "images.beton"
        with BetonWriter(path, max_samples=len(found)) as writer:
            for case in found:
                writer.append(EncodedImage("jpg", 48, SIZE, case.data), 0)
            writer.finish({"classes": ["all"]})
    alone, together = native_pixels(mode, path, found)
    for number, case in enumerate(found):
        where = f"{case.name} ({case.change})"
        expected = shown(case.data)
        assert (alone[number] is None) == (together[number] is None), where
        if alone[number] is None:
            # before FFCV sees a JPEG, its own size must be found and be the table's
            assert expected is None or (mode == "ffcv" and "its tables" in case.change), where
            continue
        for pixels in (alone[number], together[number]):
            assert expected is not None, f"{where}: shown, though Pillow refuses it"
            near = psnr(np.array(pixels, np.uint8), expected)
            assert near == float("inf") if mode == "ffcv" else near >= 35, f"{where}: {near} dB"
    assert 0 < alone.count(None) < len(found)


def native_pixels(mode: str, path: Path, found: list[Case]) -> tuple[list[Any], list[Any]]:
    """Pixels of every case (None: refused) alone and in one batch; a crash or a hang fails with the case's name."""
    command = [sys.executable, __file__, mode, str(path)]
    environment = os.environ | {"PYTHONSAFEPATH": ""}  # the script imports what lies beside it
    log = path.parent / f"{mode}.log"
    with log.open("w") as output:
        # one that hangs is ended by a signal
        limited = ["timeout", str(SECONDS_PER_BLOCK), *command]
        done = subprocess.run(limited, stdout=output, stderr=subprocess.PIPE, env=environment)
    lines = log.read_text().splitlines()
    if done.returncode:
        begun = [int(line.split()[1]) for line in lines if line.startswith("begin")]
        place = f"case {found[begun[-1]].name} ({found[begun[-1]].change})" if begun else "its start"
        pytest.fail(f"{mode} ended with {done.returncode} at {place}: {done.stderr.decode(errors='replace')[-1000:]}")
    alone, together = (json.loads(line) for line in lines[-2:])
    return alone, together


def native_worker(mode: str, path: str) -> None:
    """Decode every image of a folder or beton; printed on the way: which one is begun."""
    if mode == "dali":
        from vadit.images.dali import dali_decoder

        images = ImageSet(FolderSource(path), SIZE)
        start = dali_decoder(images, 2, "cpu")
    else:
        from vadit.images.ffcv import ffcv_decoder

        images = ImageSet(BetonSource(path), SIZE)
        start = ffcv_decoder(images, 2)
    with start() as decoder:

        def pixels(indices: list[int]) -> list[Any]:
            decoded = decoder.submit([Request(index) for index in indices])()
            for place, error in decoded.failures.items():
                assert images.source.describe(indices[place]) in str(error), error
            return [
                None if place in decoded.failures else decoded.pixels[place].tolist() for place in range(len(indices))
            ]

        alone = []
        for index in range(len(images)):
            print("begin", index, flush=True)
            alone += pixels([index])
        print(json.dumps(alone))
        print(json.dumps(pixels(list(range(len(images))))))


if __name__ == "__main__":
    native_worker(*sys.argv[1:])
