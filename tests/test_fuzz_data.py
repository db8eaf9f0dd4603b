"""Damaged latent shards and tars: no crash, no hang, no sample that is wrong in silence (see mutations.py).

Betons are in test_beton.py. Where a format has no checksum a test says what is noticed and what is not.
`pytest tests/test_fuzz_data.py -k tar-block3` runs a block again; a failure names the case, the region and the change.
"""

import random
import tarfile
from pathlib import Path
from typing import Any

import torch
from image_files import jpeg
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder
from mutations import BLOCK, Region, blocks, cases, check
from tar_files import write_tar

from vadit.config import DiTSpec, LatentDataSpec
from vadit.images.sources.tar import TarSource
from vadit.images.sources.tar_index import index_path
from vadit.latents.dataset import open_latents
from vadit.latents.shards import open_shard
from vadit.runtime.errors import RunError, UsageError

# --- latent shards
EPOCHS = 12
"""So many that every latent and every mirrored one is seen."""
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


# --- tar shards
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
