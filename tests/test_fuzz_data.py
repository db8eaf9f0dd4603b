"""Damaged shards, tars and image files: no crash, no hang, no sample that is wrong in silence (see mutations.py).

Betons are in test_beton.py. Where a format has no checksum a test says what is noticed and what is not: the pixels of a
damaged JPEG are whatever libjpeg makes of it, but the same everywhere. DALI and FFCV could end the whole process: they
run in one of their own that says which case it is at.
`pytest tests/test_fuzz_data.py -k tar-block3` runs a block again.
"""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import center_crop, encode, jpeg, photo, psnr
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder
from mutations import BLOCK, NUM_NATIVE_CASES, SECONDS_PER_BLOCK, Case, Region, blocks, cases, check
from PIL import Image
from tar_files import write_tar

from vadit.config import DiTSpec, LatentDataSpec
from vadit.images.loader import ImageSet, Request
from vadit.images.pillow import pillow_decoder
from vadit.images.sources.beton import BetonSource, EncodedImage
from vadit.images.sources.beton_writer import BetonWriter
from vadit.images.sources.folders import FolderSource
from vadit.images.sources.tar import TarSource
from vadit.images.sources.tar_index import index_path
from vadit.images.transforms import to_rgb
from vadit.latents.dataset import open_latents
from vadit.latents.shards import open_shard
from vadit.runtime.errors import RunError, UsageError

EPOCHS = 12  # So many that every latent and every mirrored one is seen.
MODEL = DiTSpec(input_size=SIDE, in_channels=CHANNELS, num_classes=CLASSES)


def write_latents(folder: Path, layout: str) -> Path:
    """A folder of `vadit encode` ("moments"), or as the authors' script leaves it; the shard to change."""
    if layout == "moments":
        moments_folder(folder)
        return folder / "shard-00001.safetensors"
    reference_folder(folder)
    return folder / "latents_rank01_shard000.safetensors"


def read_latents(folder: Path) -> dict[str, Any]:
    """Every latent, plain and mirrored as it comes, with its label."""
    dataset = open_latents(LatentDataSpec(path=str(folder)), MODEL)
    ids = torch.arange(len(dataset))
    epochs = [dataset.batch(ids, epoch, 0) for epoch in range(EPOCHS)]
    return {
        "latents": [[latent.numpy().tobytes() for latent in latents] for latents, _ in epochs],
        "labels": [labels.tolist() for _, labels in epochs],
        "classes": dataset.num_classes,
    }


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@blocks("latents")
def test_latent_shards(tmp_path: Path, start: int) -> None:
    """Length, header and file size of a shard that `vadit encode` wrote."""
    path = write_latents(tmp_path / "latents", "moments")
    data, original = path.read_bytes(), read_latents(path.parent)
    end = header_end(data)
    found = cases("latents", start, data, [("its length", 0, 8), ("its header", 8, end), ("its header", 8, end)])
    check(found, path, lambda: read_latents(path.parent), original)


@blocks("authors")
def test_latent_shards_of_the_authors(tmp_path: Path, start: int) -> None:
    path = write_latents(tmp_path / "latents", "authors")
    data, original = path.read_bytes(), read_latents(path.parent)
    found = cases("authors", start, data, [("its length", 0, 8), ("its header", 8, header_end(data))])
    check(found, path, lambda: read_latents(path.parent), original)


@blocks("payload")
def test_payloads_of_latents(tmp_path: Path, start: int) -> None:
    """A run notices what is not finite, and labels that are no class; `vadit encode` any bit, by the checksum.

    A run does not notice any other bits of a number, nor a label that is another class. They change their own sample
    alone.
    """
    layout = "moments" if start % (2 * BLOCK) else "authors"
    path = write_latents(tmp_path / "latents", layout)
    data, original = path.read_bytes(), read_latents(path.parent)
    noticed = 0
    for number in range(start, start + BLOCK):
        draw = random.Random(f"payload {number}")
        changed = bytearray(data)
        place = draw.randrange(header_end(data), len(data))
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert not open_shard(path).is_intact()
            found = read_latents(path.parent)
        except (RunError, UsageError) as error:
            assert str(path.parent) in str(error)
            noticed += 1
            continue
        for key in ("latents", "labels"):
            for epoch, expected in zip(found[key], original[key], strict=True):
                assert sum(one != other for one, other in zip(epoch, expected, strict=True)) <= 1, f"payload-{number}"
        assert found["classes"] == original["classes"]
    assert noticed < BLOCK


def write_shard(folder: Path) -> Path:
    """A shard of five small JPEGs of four classes; names of two members are too long for one header."""
    members: list[tuple[str, bytes]] = []
    for number in range(5):
        key = f"{'long/' * 30 if number == 2 else ''}{number:04d}"
        members += [(f"{key}.jpg", jpeg(number, 24, 20)), (f"{key}.cls", str(number % 4).encode())]
    return write_tar(folder / "images-000000.tar", members)


def read_tar(path: Path) -> dict[str, Any]:
    source = TarSource(path)
    return {
        "classes": source.classes,
        "labels": source.labels.tolist(),
        "data": [source.read(index) for index in range(len(source))],
        "names": [source.describe(index) for index in range(len(source))],
    }


def tar_regions(path: Path) -> list[Region]:
    """Headers of members (an image, a label, one of a long name), and the end: contents have no checksum."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    found = [(f"the header of {member.name}", member.offset, member.offset_data) for member in (members[2], members[3])]
    end = members[-1].offset_data + members[-1].size
    return [
        *found,
        ("the header of a long name", members[4].offset, members[4].offset + tarfile.BLOCKSIZE),
        ("size and checksum of a header", members[2].offset + 124, members[2].offset + 156),
        ("its end", end, end + 1024),
    ]


@blocks("tar")
def test_tars(tmp_path: Path, start: int) -> None:
    """A shard: refused as a whole, or by sample, or unchanged. Skipping leaves no wrong sample."""
    path = write_shard(tmp_path / "shards")
    data, original, regions = path.read_bytes(), read_tar(path), tar_regions(path)
    samples = dict(zip(original["names"], zip(original["data"], original["labels"], strict=True), strict=True))

    def read() -> dict[str, Any]:
        index_path(path).unlink(missing_ok=True)
        with_skips(path, samples)
        return read_tar(path)

    # The end marker and its padding hold nothing.
    check(cases("tar", start, data, regions), path, read, original)


def with_skips(path: Path, samples: dict[str, tuple[bytes, int]]) -> None:
    """What on_error="skip" leaves of a shard is as it was."""
    try:
        source = TarSource(path, on_error="skip")
    except (RunError, UsageError):
        return
    for index in range(len(source)):
        try:
            data = source.read(index)
        except RunError:
            continue
        name = source.describe(index)
        assert (data, int(source.labels[index])) == samples.get(name), f"{name} changed in silence, with on_error=skip"


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
        from vadit.images.dali import DaliDecoder

        images = ImageSet(FolderSource(path), SIZE)
        start = partial(DaliDecoder, images, 2, "cpu")
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
