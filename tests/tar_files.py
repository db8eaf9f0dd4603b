"""WebDataset shards for tests."""

import io
import random
import tarfile
from pathlib import Path

from vadit.images.sources.tar import TarSource
from vadit.images.sources.tar_index import BLOCK

Members = list[tuple[str, bytes]]


def blob(number: int, size: int | None = None) -> bytes:
    draw = random.Random(number)
    return draw.randbytes(draw.randint(1, 3000) if size is None else size)


def samples(first: int, count: int) -> Members:
    """JPEG-like members and their labels, as `webdataset` writes them: number modulo 3."""
    found: Members = []
    for number in range(first, first + count):
        found += [(f"{number:05d}.cls", str(number % 3).encode()), (f"{number:05d}.jpg", blob(number))]
    return found


def write_tar(path: Path, members: Members, kind: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def bytes_of(source: TarSource) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


def with_checksum(data: bytearray, position: int) -> bytearray:
    block = data[position : position + BLOCK]
    block[148:156] = b" " * 8
    data[position + 148 : position + 156] = b"%06o\0 " % sum(block)
    return data
