"""Damaged latent shards, tars and betons: no crash, no hang, no sample that is wrong in silence (see mutations.py).

Where a format has no checksum a test says what is noticed and what is not. `pytest tests/test_fuzz_data.py -k
tar-block3` runs a block again; a failure names the case, the region and the change.
"""

from __future__ import annotations

import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import encode, jpeg, photo
from mutations import BLOCK, NUM_CASES, NUM_NATIVE_CASES, Region, blocks, cases, check
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tar_files import write_tar

from vadit.config import DiTSpec, LatentDataSpec
from vadit.images.beton import FIELD, FOOTER, HEADER, BetonSource, EncodedImage
from vadit.images.beton_writer import BetonWriter
from vadit.images.tar import TarSource
from vadit.images.tar_index import index_path
from vadit.latents.dataset import compute_statistics, open_latents
from vadit.latents.shards import LatentSettings, LatentShardWriter, save_index
from vadit.runtime.errors import RunError, UsageError


def test_there_are_500_cases() -> None:
    assert sum(NUM_CASES.values()) >= 500  # and those that need DALI and FFCV
    assert all(count % BLOCK == 0 for count in [*NUM_CASES.values(), *NUM_NATIVE_CASES.values()])


# ------------------------------------------------------------------------------------------------ latent shards

CHANNELS, SIDE = 2, 3
EPOCHS = 12
"""So many that every latent and every mirrored one is seen."""
MODEL = DiTSpec(input_size=SIDE, in_channels=CHANNELS, num_classes=3)


def latent_settings() -> LatentSettings:
    return LatentSettings("abc", "{}", "images", 12, 3, 8, "moments", "fp32", True, 0, 6)


def write_moments(folder: Path) -> Path:
    """A folder of `vadit encode`, two shards of six; the shard to change."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        writer = LatentShardWriter(folder / f"shard-{number:05d}.safetensors", latent_settings())
        plain, flipped = (torch.rand(6, 2 * CHANNELS, SIDE, SIDE, generator=generator) for _ in range(2))
        writer.add(plain, flipped, torch.arange(6) % 3, torch.arange(6) + 6 * number)
        writer.close()
    compute_statistics(folder)
    save_index(folder, latent_settings(), ["a", "b", "c"])
    return folder / "shard-00001.safetensors"


def write_authors(folder: Path) -> Path:
    """A folder as the authors' script leaves it; the shard to change."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"latents_rank00_shard{number:03d}.safetensors" for number in range(2)]
    for path in paths:
        latents, flipped = (torch.rand(6, CHANNELS, SIDE, SIDE, generator=generator) for _ in range(2))
        tensors = {"latents": latents, "latents_flip": flipped, "labels": torch.arange(6) % 3}
        save_file(tensors, path, metadata={"total_size": "6", "dtype": "torch.float32", "device": "cpu"})
    compute_statistics(folder)
    return paths[1]


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
    path = write_moments(tmp_path / "latents")
    data, original = path.read_bytes(), read_latents(path.parent)
    end = header_end(data)
    found = cases("latents", start, data, [("its length", 0, 8), ("its header", 8, end), ("its header", 8, end)])
    check(found, path, lambda: read_latents(path.parent), original)


@blocks("authors")
def test_latent_shards_of_the_authors(tmp_path: Path, start: int) -> None:
    path = write_authors(tmp_path / "latents")
    data, original = path.read_bytes(), read_latents(path.parent)
    found = cases("authors", start, data, [("its length", 0, 8), ("its header", 8, header_end(data))])
    check(found, path, lambda: read_latents(path.parent), original)


@blocks("payload")
def test_payloads_of_latents(tmp_path: Path, start: int) -> None:
    """Latents and labels themselves have no checksum. Noticed: what is not finite, and labels that are no class.

    Not noticed: any other bits of a number, and a label that is another class. They change their own sample alone.
    """
    path = write_moments(tmp_path / "latents") if start % (2 * BLOCK) else write_authors(tmp_path / "latents")
    data, original = path.read_bytes(), read_latents(path.parent)
    noticed = 0
    for number in range(start, start + BLOCK):
        draw = random.Random(f"payload {number}")
        changed = bytearray(data)
        place = draw.randrange(header_end(data), len(data))
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("write", [write_moments, write_authors])
def test_latents_that_are_not_finite_are_always_noticed(
    tmp_path: Path, write: Callable[[Path], Path], value: float
) -> None:
    path = write(tmp_path / "latents")
    data = path.read_bytes()
    for number in range(8):
        draw = random.Random(number)
        tensors = load_file(path)
        name = draw.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
        row = draw.randrange(6)
        tensors[name][row].view(-1)[draw.randrange(tensors[name][row].numel())] = value
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata)
        with pytest.raises(RunError, match=rf"{path.name}: .*\(row {row}\) .*not finite"):
            read_latents(path.parent)
        path.write_bytes(data)


# ------------------------------------------------------------------------------------------------ tar shards


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


@blocks("tar-index")
def test_indices_of_tars(tmp_path: Path, start: int) -> None:
    """The index beside a shard is a cache: where it is damaged it is made anew."""
    path = write_shard(tmp_path / "shards")
    original = read_tar(path)
    index = index_path(path)
    data = index.read_bytes()
    for case in cases("tar-index", start, data, [("it", 0, len(data))]):
        index.write_bytes(case.data)
        assert read_tar(path) == original, f"{case.name} ({case.change})"


# ------------------------------------------------------------------------------------------------ betons


def write_beton(path: Path) -> Path:
    """A .beton of `vadit prepare`'s writer: four small JPEGs and two raw images."""
    with BetonWriter(path, max_samples=6, page_size=1 << 21) as writer:
        for number in range(6):
            image = photo(number, 24, 20)
            raw = number % 3 == 2
            data = image.tobytes() if raw else encode(image)
            writer.append(EncodedImage("raw" if raw else "jpg", 24, 20, data), number % 4)
        writer.finish({"classes": ["a", "b", "c", "d"]})
    return path


def read_beton(path: Path) -> dict[str, Any]:
    source = BetonSource(path)
    return {
        "classes": source.classes,
        "labels": source.labels.tolist(),
        "data": [source.read(index) for index in range(len(source))],
    }


def beton_regions(path: Path) -> list[Region]:
    """Every part of the file."""
    source = BetonSource(path)
    data = path.read_bytes()
    table = struct.unpack_from("<Q", data, 16)[0]
    rows = HEADER.itemsize + len(source.file.fields) * FIELD.itemsize
    notes = data.rindex(b'{"format"')
    spans = [(int(ptr), int(ptr + size)) for ptr, size in zip(source.ptrs, source.sizes, strict=True)]
    descriptors = [(HEADER.itemsize + number * FIELD.itemsize) for number in range(len(source.file.fields))]
    return [
        ("its header", 0, HEADER.itemsize),
        *((f"field descriptor {number}", start, start + 20) for number, start in enumerate(descriptors)),
        ("its rows", rows, rows + source.file.rows.nbytes),
        *((f"payload {number}", *spans[number]) for number in (1, 2)),
        ("its notes", notes, table - FOOTER.itemsize),
        ("its footer", table - FOOTER.itemsize, table),
        ("its allocations", table, len(data)),
    ]


@blocks("beton")
def test_betons(tmp_path: Path, start: int) -> None:
    path = write_beton(tmp_path / "images.beton")
    original = read_beton(path)
    check(cases("beton", start, path.read_bytes(), beton_regions(path)), path, lambda: read_beton(path), original)
