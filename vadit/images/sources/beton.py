"""FFCV's .beton format (https://github.com/libffcv/ffcv, version 2), read without ffcv and checked before it is used.

| part | content |
|---|---|
| header | version, number of fields and samples, page size, where the allocation table begins |
| fields | type, name and arguments of each field |
| rows | one per sample: numbers themselves; of images mode, width, height and address; of arrays the address |
| pages | payloads; none crosses a page's end (8 MiB), and those of one sample share a page |
| notes | ours, which FFCV skips: JSON, then a footer with checksums of the JSON and of the tables |
| allocations | sample, address and size of every payload, to the end of the file |

Files of ours (`beton_writer`) have the fields OUR_FIELDS: `label` is the class, whose name stands in the
notes, and `crc32` the checksum of the sample (see `row_crc32`). FFCV itself trusts the addresses and sizes that it
finds and reads wherever they point, so it is given only files that `BetonFile` has taken.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vadit.images.jpeg import jpeg_size
from vadit.images.sources.folders import SET_FOLDER, ppm
from vadit.images.sources.labels import MAX_CLASSES
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.json_files import MAX_BYTES, checked, parse_json
from vadit.runtime.reading import OpenFiles, readable

VERSION = 2
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 1 << 21, 1 << 31
JPG, RAW = 0, 1

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("kind", "<u1"), ("name", "S16"), ("arguments", "<u1", (1024,))])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
_SIZED = np.dtype([("ptr", "<u8"), ("size", "<u8")])
FOOTER = np.dtype([("magic", "S8"), ("size", "<u4"), ("notes_crc32", "<u4"), ("tables_crc32", "<u4"), ("zero", "<u4")])
MAGIC = b"VADITNT1"

ROW_TYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype("<f8"),
    "int": np.dtype("<i8"),
    "image": IMAGE,
    "bytes": _SIZED,
    "array": np.dtype("<u8"),
    "json": _SIZED,
    "tensor": np.dtype("<u8"),
}
"""By kind of field, in the order of FFCV's type numbers."""
KINDS = tuple(ROW_TYPES)


class Field(NamedTuple):
    """A column of the file."""

    name: str
    kind: str


OUR_FIELDS = (Field("image", "image"), Field("label", "int"), Field("crc32", "int"))


class EncodedImage(NamedTuple):
    """An image as it lies in the file. Worker processes make it, the one writer appends it."""

    mode: Literal["jpg", "raw"]
    width: int
    height: int
    data: bytes | memoryview  # the file of a JPEG, or height x width x 3 bytes of pixels


def row_type(fields: Sequence[Field]) -> np.dtype[Any]:
    """The type of one row of the table, a column for each field by its name."""
    return np.dtype([(field.name, ROW_TYPES[field.kind]) for field in fields], align=True)


def row_crc32(image: EncodedImage, label: int) -> int:
    """Checksum of a sample of ours: mode, width and height as 8 bytes each, the payload, the label as 8 bytes."""
    shape = (JPG if image.mode == "jpg" else RAW, image.width, image.height)
    checksum = zlib.crc32(image.data, zlib.crc32(b"".join(number.to_bytes(8, "little") for number in shape)))
    return zlib.crc32(label.to_bytes(8, "little", signed=True), checksum)


class BetonFile:
    """A .beton whose tables have been checked: its fields, rows (n,), notes, and the payloads' places.

    UsageError: there is no such file. RunError: the file is damaged, or of another format; it says where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._file = OpenFiles([self.path])
        with readable(self.path, f"{SET_FOLDER} to a .beton", UsageError):
            self.size = self._size()
        self._parse()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ptr: int, size: int) -> bytes:
        """Bytes of the file, from any thread."""
        with readable(self.path, "copy it anew"):
            data = self._file.read(0, ptr, size)
        if len(data) != size:
            raise RunError(f"{self.path} was cut short while it was in use; copy it anew")
        return data

    def check_size(self) -> None:
        """RunError if the file has been cut since it was opened: its memory map would end the process."""
        if self._size() < self.size:
            raise RunError(f"{self.path} was cut short while it was in use; copy it anew")

    def will_read(self, ptr: int, size: int) -> None:
        """Have the system bring a part of the file into memory; it need not."""
        self._file.use(0, lambda descriptor: os.posix_fadvise(descriptor, ptr, size, os.POSIX_FADV_WILLNEED))

    def _size(self) -> int:
        return self._file.use(0, lambda descriptor: os.fstat(descriptor).st_size)

    def fail(self, problem: str) -> RunError:
        return RunError(f"{self.path} is damaged, or no .beton file: {problem}; copy or make it anew")

    def _parse(self) -> None:
        if self.size < HEADER.itemsize:
            raise self.fail(f"it has {self.size} bytes, fewer than a header")
        header = np.frombuffer(self.read(0, HEADER.itemsize), HEADER)[0]
        version, num_fields, page_size, count, table = (int(value) for value in header)
        if version != VERSION:
            raise self.fail(f"its version is {version}, not {VERSION}")
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise self.fail(f"its page size is {page_size}, not a power of two from 2 MiB to 2 GiB")
        if num_fields < 1 or not HEADER.itemsize + num_fields * FIELD.itemsize <= table <= self.size:
            raise self.fail(f"it has {num_fields} fields, and allocations at byte {table} of {self.size}")
        self.page_size = page_size
        described = self.read(HEADER.itemsize, num_fields * FIELD.itemsize)
        self.fields = self._parse_fields(np.frombuffer(described, FIELD))
        self.is_ours = self.fields == OUR_FIELDS
        kind = row_type(self.fields)
        rows_start = HEADER.itemsize + len(described)
        if count < 1 or count * kind.itemsize > table - rows_start:
            raise self.fail(f"it claims {count} samples, and {table - rows_start} bytes hold their rows and content")
        rows_end = rows_start + count * kind.itemsize
        self._refuse_holes(0, rows_end)
        self._refuse_holes(table, self.size)
        self.rows = np.frombuffer(self.read(rows_start, count * kind.itemsize), kind)
        if (self.size - table) % ALLOCATION.itemsize:
            raise self.fail(f"its table of allocations ends in the middle of an entry (byte {self.size})")
        allocations = np.frombuffer(self.read(table, self.size - table), ALLOCATION)
        tables = (self.read(0, rows_end), allocations.tobytes())
        self.notes, content_end = self._parse_notes(rows_end, table, tables)
        self.sizes: dict[str, np.ndarray] = {}  # bytes of each image field's payloads, uint64 (n,)
        self._place(allocations, rows_end, content_end)

    def _refuse_holes(self, start: int, end: int) -> None:
        """A table that was never written has no bytes on the disk, whatever its size: it is not worth its memory."""
        hole = self._file.use(0, lambda descriptor: os.lseek(descriptor, start, os.SEEK_HOLE)) if start < end else end
        if hole < end:
            raise self.fail(f"its tables have a hole at byte {hole}")

    def _parse_fields(self, entries: np.ndarray) -> tuple[Field, ...]:
        names = [bytes(entry["name"]).split(b"\0")[0] for entry in entries]
        are_named = all(name.isascii() and name.decode().isprintable() for name in names) and all(names)
        if not are_named or len(set(names)) < len(names) or (entries["kind"] >= len(KINDS)).any():
            raise self.fail(f"its fields are {names}, of types {entries['kind'].tolist()}")
        return tuple(Field(name.decode(), KINDS[kind]) for name, kind in zip(names, entries["kind"], strict=True))

    def _parse_notes(self, start: int, table: int, tables: tuple[bytes, bytes]) -> tuple[dict[str, Any], int]:
        """Our notes (empty in FFCV's own files) and the byte where the payloads end."""
        footer = None
        if table - start >= FOOTER.itemsize:
            footer = np.frombuffer(self.read(table - FOOTER.itemsize, FOOTER.itemsize), FOOTER)[0]
        if footer is None or footer["magic"] != MAGIC:
            if self.is_ours:
                raise self.fail("the checksums of its tables are missing")
            return {}, table
        end = table - FOOTER.itemsize - int(footer["size"])
        text = self.read(end, int(footer["size"])) if end >= start and footer["size"] <= MAX_BYTES else b""
        checksums = zlib.crc32(text), zlib.crc32(tables[1], zlib.crc32(tables[0]))
        if not text or checksums != (footer["notes_crc32"], footer["tables_crc32"]):
            raise self.fail("its notes or its tables fail their checksum")
        notes = parse_json(text, dict[str, Any], f"{self.path}: its notes", remedy="copy or make the file anew")
        return notes, end

    def _place(self, allocations: np.ndarray, start: int, end: int) -> None:
        """Find every payload in the table: each one inside the file and one page, none over another, each used once."""
        ptrs, sizes = allocations["ptr"], allocations["size"]
        order = np.argsort(ptrs, kind="stable")
        ptrs, sizes, owners = ptrs[order], sizes[order], allocations["sample"][order]
        room = np.uint64(end) - np.minimum(ptrs, np.uint64(end))
        page = np.uint64(self.page_size)
        if (sizes == 0).any() or (ptrs < start).any() or (sizes > room).any():
            raise self.fail("a payload lies outside the file")
        if (ptrs % page + sizes > page).any():
            raise self.fail("a payload crosses the end of a page")
        if (ptrs[:-1] + sizes[:-1] > ptrs[1:]).any():
            raise self.fail("two payloads overlap")
        used = 0
        for field in self.fields:
            if field.kind in ("int", "float"):
                continue
            column = self.rows[field.name]
            wanted = column if field.kind in ("array", "tensor") else column["ptr"]
            found = np.searchsorted(ptrs, wanted)
            hit = found < len(ptrs)
            hit[hit] = (ptrs[found[hit]] == wanted[hit]) & (owners[found[hit]] == np.flatnonzero(hit))
            if not hit.all():
                raise self.fail(f"the {field.name} of sample {np.flatnonzero(~hit)[0]} is not in its table")
            if field.kind == "image":
                self.sizes[field.name] = sizes[found]
                self._check_images(column, sizes[found])
            used += len(wanted)
        if used != len(allocations):
            raise self.fail(f"it holds {len(allocations)} payloads, and its samples use {used}")

    def _check_images(self, rows: np.ndarray, sizes: np.ndarray) -> None:
        pixels = rows["width"].astype(np.uint64) * rows["height"].astype(np.uint64) * np.uint64(3)
        fits = np.where(rows["mode"] == RAW, sizes == pixels, rows["mode"] == JPG)
        if len(wrong := np.flatnonzero((pixels == 0) | ~fits)):
            row = rows[wrong[0]]
            raise self.fail(
                f"sample {wrong[0]} is said to have {row['width']} x {row['height']} pixels in {sizes[wrong[0]]} bytes "
                f"of mode {row['mode']}"
            )


class BetonSource:
    """The images of a .beton file as an ImageSource; without ffcv.

    The image is the field `image` (or the only one of images), the label `label` (or the only int). `.widths` and
    `.heights` are int64 (n,). Names of classes stand in files that `vadit prepare` made; else they are the numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self.file = BetonFile(path)
        self.image_field = self._pick("image", "image")
        rows = self.file.rows[self.image_field]
        self.is_jpeg = rows["mode"] == JPG
        self.widths, self.heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        self.ptrs, self.sizes = np.ascontiguousarray(rows["ptr"]), self.file.sizes[self.image_field]
        labels = self.file.rows[self._pick("label", "int")]
        self.labels: Tensor = torch.from_numpy(labels.astype(np.int64))
        self.classes = self._class_names(int(labels.min()), int(labels.max()))

    def __len__(self) -> int:
        return len(self.file)

    def read(self, index: int) -> bytes:
        """A JPEG's bytes, or raw pixels as PPM; compared with their checksum, where the file has one."""
        image = self.check(index)
        return bytes(image.data) if image.mode == "jpg" else ppm(image.width, image.height, bytes(image.data))

    def check(self, index: int, mapped: memoryview | None = None) -> EncodedImage:
        """An image that passed its checksum, where there is one, and whose JPEG has the table's size.

        A decoder that believed the table would else write past its buffer. The data is a part of `mapped` (the whole
        file) where that is given, else it is read.
        """
        ptr, size = int(self.ptrs[index]), int(self.sizes[index])
        data = self.file.read(ptr, size) if mapped is None else mapped[ptr : ptr + size]
        mode: Literal["jpg", "raw"] = "jpg" if self.is_jpeg[index] else "raw"
        image = EncodedImage(mode, int(self.widths[index]), int(self.heights[index]), data)
        if self.file.is_ours and row_crc32(image, int(self.labels[index])) != int(self.file.rows["crc32"][index]):
            raise RunError(f"sample {index} of {self.name} fails its checksum; copy or make the file anew")
        if mode == "jpg":
            found = jpeg_size(data)
            if found != (image.width, image.height):
                what = "it is no JPEG" if found is None else f"its JPEG has {found[0]} x {found[1]}"
                sides = f"{image.width} x {image.height}"
                raise RunError(f"{self.describe(index)}: the table says {sides} pixels, but {what}; make the file anew")
        return image

    def describe(self, index: int) -> str:
        """file.beton:17."""
        return f"{self.name}:{index}"

    def _pick(self, name: str, kind: str) -> str:
        candidates = [field.name for field in self.file.fields if field.kind == kind]
        if name in candidates:
            return name
        if len(candidates) == 1:
            return candidates[0]
        raise UsageError(
            f"{self.name} has the fields {', '.join(field.name for field in self.file.fields)}, and none or several "
            f"could be its {name}; {SET_FOLDER} to a .beton with fields image and label"
        )

    def _class_names(self, lowest: int, highest: int) -> list[str]:
        origin = f"{self.name}: the classes in its notes"
        names = checked(list[str] | None, self.file.notes.get("classes"), origin)  # type: ignore[arg-type]
        bound = MAX_CLASSES if names is None else len(names)
        if lowest < 0 or highest >= bound:
            raise self.file.fail(f"its labels go from {lowest} to {highest}, not from 0 to {bound - 1}")
        return [str(label) for label in range(highest + 1)] if names is None else names
