"""Reading .beton files (vadit.images.beton_writer tells the format): everything is checked before anything is used.

FFCV itself trusts the addresses and sizes that it finds and reads wherever they point, so it is given only files that
`BetonFile` has taken.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vadit.images.beton_writer import (
    ALLOCATION,
    FIELD,
    FOOTER,
    HEADER,
    JPG,
    KINDS,
    MAGIC,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    NOTES_FORMAT,
    RAW,
    VERSION,
    EncodedImage,
    Field,
    Value,
    row_crc32,
    row_type,
)
from vadit.runtime.errors import RunError, UsageError

MAX_FIELDS = 64
MAX_CLASSES = 1 << 20
"""Largest label + 1 of a file that names no classes: a damaged label shall not make a list of billions."""
CRC_NAME = "crc32"
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class BetonFile:
    """A .beton whose tables have been checked: its fields, rows, and the payloads' places.

    UsageError: there is no such file. RunError: the file is damaged, or of another format; it says where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be opened ({error.strerror}); set data.path to a .beton file"
            ) from error
        try:
            self.size = os.fstat(self._descriptor).st_size
            self._parse()
        except OSError as error:
            raise RunError(f"{self.path} cannot be read ({error.strerror}); copy it anew") from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """A field's part of the rows, (n,)."""
        return self.rows[f"f{self._number(name)}"]

    def payloads(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and sizes of a field's payloads, uint64 (n,) each."""
        return self._spans[self._number(name)]

    def read(self, ptr: int, size: int) -> bytes:
        """Bytes of the file, from any thread."""
        try:
            data = os.pread(self._descriptor, size, ptr)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read at byte {ptr} ({error.strerror}); copy it anew") from error
        if len(data) != size:
            raise RunError(f"{self.path} was cut short while it was in use; copy it anew")
        return data

    def check_size(self) -> None:
        """RunError if the file has been cut since it was opened: its memory map would end the process."""
        if os.fstat(self._descriptor).st_size < self.size:
            raise RunError(f"{self.path} was cut short while it was in use; copy it anew")

    def will_read(self, ptr: int, size: int) -> None:
        """Have the system bring a part of the file into memory; it need not."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, ptr, size, os.POSIX_FADV_WILLNEED)

    def map(self) -> np.ndarray:
        """The whole file, uint8, memory-mapped and read-only."""
        return np.frombuffer(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ), np.uint8)

    def check_row(self, index: int, values: list[Value]) -> None:
        """Compare a sample (values in the fields' order, without crc32) with its checksum, where the file has them."""
        if self.has_crc32 and row_crc32(values) != int(self.column(CRC_NAME)[index]):
            raise RunError(f"sample {index} of {self.path} fails its checksum; copy or make the file anew")

    def sample(self, index: int, mapped: memoryview | None = None) -> list[Value]:
        """A sample's values in the fields' order, without crc32; the checksum is compared where there is one.

        Payloads are parts of `mapped` (the whole file) where it is given, else they are read.
        """
        values: list[Value] = []
        for number, field in enumerate(self.fields):
            if field.name == CRC_NAME and self.has_crc32:
                continue
            ptrs, sizes = self._spans[number]
            if len(ptrs) == 0:
                values.append(int(self.rows[f"f{number}"][index]))
                continue
            ptr, size = int(ptrs[index]), int(sizes[index])
            data = self.read(ptr, size) if mapped is None else mapped[ptr : ptr + size]
            if field.kind == "image":
                row = self.rows[f"f{number}"][index]
                mode: Literal["jpg", "raw"] = "jpg" if row["mode"] == JPG else "raw"
                values.append(EncodedImage(mode, int(row["width"]), int(row["height"]), data))
            else:
                values.append(data)
        self.check_row(index, values)
        return values

    def fail(self, problem: str) -> RunError:
        """The error of a damaged file."""
        return RunError(f"{self.path} is damaged, or no .beton file: {problem}; copy or make it anew")

    def _number(self, name: str) -> int:
        return next(number for number, field in enumerate(self.fields) if field.name == name)

    def _parse(self) -> None:
        if self.size < HEADER.itemsize:
            raise self.fail(f"it has {self.size} bytes, fewer than a header")
        header = np.frombuffer(self.read(0, HEADER.itemsize), HEADER)[0]
        version, num_fields, page_size, count, table = (int(value) for value in header)
        if version != VERSION:
            raise self.fail(f"its version is {version}, not {VERSION}")
        if not 1 <= num_fields <= MAX_FIELDS:
            raise self.fail(f"it has {num_fields} fields, not 1 to {MAX_FIELDS}")
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise self.fail(f"its page size is {page_size}, not a power of two from 2 MiB to 2 GiB")
        if not HEADER.itemsize + num_fields * FIELD.itemsize <= table <= self.size:
            raise self.fail(f"its table of allocations is said to be at byte {table} of {self.size}")
        self.page_size = page_size
        described = self.read(HEADER.itemsize, num_fields * FIELD.itemsize)
        self.fields = self._parse_fields(np.frombuffer(described, FIELD))
        kind = row_type([field.kind for field in self.fields])
        rows_start = HEADER.itemsize + len(described)
        if count < 1 or count * kind.itemsize > table - rows_start:
            raise self.fail(f"it claims {count} samples, and {table - rows_start} bytes hold their rows and content")
        rows_end = rows_start + count * kind.itemsize
        self.rows = np.frombuffer(self.read(rows_start, count * kind.itemsize), kind)
        if (self.size - table) % ALLOCATION.itemsize:
            raise self.fail(f"its table of allocations ends in the middle of an entry (byte {self.size})")
        allocations = np.frombuffer(self.read(table, self.size - table), ALLOCATION)
        self.has_crc32 = any(field == Field(CRC_NAME, "int") for field in self.fields)
        tables = (self.read(0, rows_end), allocations.tobytes())
        self.notes, content_end = self._parse_notes(rows_end, table, tables)
        self._place(allocations, rows_end, content_end)
        self._check_images()

    def _parse_fields(self, entries: np.ndarray) -> tuple[Field, ...]:
        fields = []
        for entry in entries:
            name = bytes(entry["name"]).split(b"\0")[0]
            if not name.isascii() or not name or not name.decode().isprintable():
                raise self.fail(f"a field's name is {name!r}")
            if entry["kind"] >= len(KINDS):
                raise self.fail(f"field {name.decode()} has the type {entry['kind']}, which FFCV does not define")
            kind = KINDS[entry["kind"]]
            size = self._array_size(name.decode(), entry["arguments"]) if kind in ("array", "tensor") else 0
            fields.append(Field(name.decode(), kind, size))
        if len({field.name for field in fields}) < len(fields):
            raise self.fail("two fields have the same name")
        return tuple(fields)

    def _array_size(self, name: str, arguments: np.ndarray) -> int:
        """Bytes of an array field's payload, from 32 dimensions and the JSON of a numpy type."""
        numbers = [int(number) for number in arguments[: 33 * 8].view("<u8")]
        shape, length = numbers[:32], numbers[32]
        try:
            (described,) = json.loads(arguments[33 * 8 :][:length].tobytes().decode("ascii"))
            itemsize = np.dtype([tuple(described)]).itemsize
        except (ValueError, TypeError, RecursionError):
            raise self.fail(f"the type of field {name} is not readable") from None
        while shape and shape[-1] == 0:
            shape.pop()
        size = itemsize
        for side in shape:
            size *= side
        if not shape or not 0 < size <= self.page_size:
            raise self.fail(f"field {name} has the shape {shape} of {itemsize} bytes each")
        return size

    def _parse_notes(self, start: int, table: int, tables: tuple[bytes, bytes]) -> tuple[dict[str, Any], int]:
        """Our notes (empty in FFCV's own files) and the byte where the payloads end."""
        if table - start < FOOTER.itemsize:
            return {}, table
        footer = np.frombuffer(self.read(table - FOOTER.itemsize, FOOTER.itemsize), FOOTER)[0]
        if footer["magic"] != MAGIC:
            if self.has_crc32:
                raise self.fail("the checksums of its tables are missing")
            return {}, table
        end = table - FOOTER.itemsize - int(footer["size"])
        if end < start:
            raise self.fail(f"its notes are said to have {footer['size']} bytes")
        text = self.read(end, int(footer["size"]))
        if zlib.crc32(text) != footer["notes_crc32"]:
            raise self.fail("its notes fail their checksum")
        if zlib.crc32(tables[1], zlib.crc32(tables[0])) != footer["tables_crc32"]:
            raise self.fail("its tables fail their checksum")
        try:
            notes = json.loads(text)
        except (ValueError, RecursionError):
            notes = None
        if not isinstance(notes, dict) or notes.get("format") != NOTES_FORMAT:
            raise self.fail("its notes are not readable")
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
        self._spans: list[tuple[np.ndarray, np.ndarray]] = []
        none = np.zeros(0, np.uint64)
        used = 0
        for number, field in enumerate(self.fields):
            column = self.rows[f"f{number}"]
            if field.kind in ("int", "float"):
                self._spans.append((none, none))
                continue
            wanted = column if field.kind in ("array", "tensor") else column["ptr"]
            found = np.searchsorted(ptrs, wanted)
            hit = found < len(ptrs)
            hit[hit] = (ptrs[found[hit]] == wanted[hit]) & (owners[found[hit]] == np.flatnonzero(hit))
            if not hit.all():
                raise self.fail(f"the {field.name} of sample {np.flatnonzero(~hit)[0]} is not in its table")
            size = sizes[found]
            if field.kind in ("bytes", "json") and (size != column["size"]).any():
                raise self.fail(f"two sizes are given for a payload of field {field.name}")
            if field.kind in ("array", "tensor") and (size != field.size).any():
                raise self.fail(f"a payload of field {field.name} does not have {field.size} bytes")
            self._spans.append((np.ascontiguousarray(wanted), size))
            used += len(wanted)
        if used != len(allocations):
            raise self.fail(f"it holds {len(allocations)} payloads, and its samples use {used}")

    def _check_images(self) -> None:
        for number, field in enumerate(self.fields):
            if field.kind != "image":
                continue
            column, sizes = self.rows[f"f{number}"], self._spans[number][1]
            if not np.isin(column["mode"], (JPG, RAW)).all():
                raise self.fail(f"sample {np.flatnonzero(~np.isin(column['mode'], (JPG, RAW)))[0]} is of no known mode")
            pixels = column["width"].astype(np.uint64) * column["height"].astype(np.uint64) * np.uint64(3)
            wrong = (pixels == 0) | ((column["mode"] == RAW) & (sizes != pixels))
            if wrong.any():
                row = column[np.flatnonzero(wrong)[0]]
                raise self.fail(
                    f"sample {np.flatnonzero(wrong)[0]} is said to have {row['width']} x {row['height']} pixels "
                    f"in {sizes[np.flatnonzero(wrong)[0]]} bytes"
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
        label_field = self._pick("label", "int")
        names = [field.name for field in self.file.fields if not (field.name == CRC_NAME and self.file.has_crc32)]
        self._image_place = names.index(self.image_field)
        rows = self.file.column(self.image_field)
        self.is_jpeg = rows["mode"] == JPG
        self.widths, self.heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        self.ptrs, self.sizes = self.file.payloads(self.image_field)
        labels = self.file.column(label_field)
        self.labels: Tensor = torch.from_numpy(labels.astype(np.int64))
        self.classes = self._class_names(int(labels.min()), int(labels.max()))

    def __len__(self) -> int:
        return len(self.file)

    def read(self, index: int) -> bytes:
        """A JPEG's bytes, or raw pixels as PPM; compared with their checksum, where the file has one."""
        image = self.check(index)
        if image.mode == "jpg":
            return bytes(image.data)
        return b"P6 %d %d 255\n" % (image.width, image.height) + image.data

    def check(self, index: int, mapped: memoryview | None = None) -> EncodedImage:
        """An image that passed its checksum, where there is one, and whose JPEG has the table's size.

        A decoder that believed the table would else write past its buffer. `mapped` as in `BetonFile.sample`.
        """
        values = self.file.sample(index, mapped)
        image = values[self._image_place]
        assert isinstance(image, EncodedImage)
        if image.mode == "jpg":
            found = jpeg_size(image.data)
            if found != (image.width, image.height):
                what = "it is no JPEG" if found is None else f"its JPEG has {found[0]} x {found[1]} pixels"
                raise RunError(
                    f"{self.describe(index)}: the table says {image.width} x {image.height} pixels, but {what}; "
                    "make the file anew"
                )
        return image

    def describe(self, index: int) -> str:
        """file.beton:17."""
        return f"{self.name}:{index}"

    def _pick(self, name: str, kind: str) -> str:
        candidates = [field.name for field in self.file.fields if field.kind == kind and field.name != CRC_NAME]
        if name in candidates:
            return name
        if len(candidates) == 1:
            return candidates[0]
        raise UsageError(
            f"{self.name} has the fields {', '.join(field.name for field in self.file.fields)}, and none or several "
            f"could be its {name}; set data.path to a .beton with fields image and label"
        )

    def _class_names(self, lowest: int, highest: int) -> list[str]:
        names = self.file.notes.get("classes")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise self.file.fail("the names of its classes are not readable")
        bound = MAX_CLASSES if names is None else len(names)
        if lowest < 0 or highest >= bound:
            raise self.file.fail(f"its labels go from {lowest} to {highest}, not from 0 to {bound - 1}")
        return [str(label) for label in range(highest + 1)] if names is None else names


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height by a JPEG's frame header; None: there is none, or not one of 8 bits and 1 or 3 components."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # fill bytes before a marker
            place += 1
            continue
        (length,) = struct.unpack_from(">H", data, place + 2)
        if marker in _START_OF_FRAME:
            if place + 10 > len(data):
                return None
            bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            return (width, height) if bits == 8 and components in (1, 3) else None
        if marker == 0xDA or length < 2:
            return None
        place += 2 + length
    return None
