"""Small .beton files for the tests of the format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vadit.images.sources.beton import FIELD, FOOTER, HEADER, MIN_PAGE_SIZE, OUR_FIELDS, BetonSource, row_type
from vadit.images.sources.beton_writer import BetonWriter, encode_image

COUNT = 9
FRONT = HEADER.itemsize + 3 * FIELD.itemsize


def picture(number: int, width: int = 20, height: int = 16) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write(path: Path, count: int = COUNT, mode: str = "both", **options: Any) -> Path:
    """`count` pictures of several widths, labels going round three classes; every second one is a JPEG."""
    with BetonWriter(path, max_samples=count + 3, page_size=MIN_PAGE_SIZE, **options) as writer:
        for number in range(count):
            kind: Any = ("raw", "jpg")[number % 2] if mode == "both" else mode
            writer.append(encode_image(picture(number, 20 + number % 4), kind), number % 3)
        writer.finish({"classes": ["cat", "dog", "eel"], "size": 16})
    return path


def decoded(source: BetonSource, index: int) -> np.ndarray:
    with Image.open(io.BytesIO(source.read(index))) as image:
        return np.asarray(image.convert("RGB"))


def without_checksums(beton: Path) -> Path:
    """The same images as FFCV's writer would leave them: without checksums and notes."""
    data = beton.read_bytes()
    entries = np.frombuffer(data, FIELD, 2, HEADER.itemsize)
    old = np.frombuffer(data, row_type(OUR_FIELDS), COUNT, FRONT)
    rows = np.zeros(COUNT, row_type(OUR_FIELDS[:2]))
    rows["image"], rows["label"] = old["image"], old["label"]
    header = np.frombuffer(data, HEADER, 1).copy()
    table = int(header["allocations"][0])
    end = table - FOOTER.itemsize - int(np.frombuffer(data, FOOTER, 1, table - FOOTER.itemsize)["size"][0])
    header["num_fields"], header["allocations"] = 2, end
    front = header.tobytes() + entries.tobytes() + rows.tobytes()
    path = beton.with_name("plain.beton")
    path.write_bytes(front + bytes(MIN_PAGE_SIZE - len(front)) + data[MIN_PAGE_SIZE:end] + data[table:])
    return path
