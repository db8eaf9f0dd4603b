"""FFCV's .beton file, written without ffcv: header, tables, pages (https://github.com/libffcv/ffcv, format version 2).

| part | content |
|---|---|
| header | version, number of fields and samples, page size, where the allocation table begins |
| fields | type, name and arguments of each field |
| rows | one per sample: numbers themselves; of images mode, width, height and address; of arrays the address |
| pages | payloads; none crosses a page's end (8 MiB), and those of one sample share a page |
| notes | ours, which FFCV skips: JSON, then a footer with checksums of the JSON and of the tables |
| allocations | sample, address and size of every payload, to the end of the file |

Our files have a field `crc32` besides: the checksum of the sample's other values and payloads (see `row_crc32`).
`beton_source` reads. A class per image is an int field `label`; class names stand in the notes.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.runtime.files import refuse_other_settings

VERSION = 2
PAGE_SIZE = 8 << 20
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 1 << 21, 1 << 31
MAX_SIDE = (1 << 16) - 1
JPG, RAW = 0, 1
ALIGNMENT = 64
"""Payloads begin at multiples of it, so that arrays of them can be mapped."""

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("kind", "<u1"), ("name", "S16"), ("arguments", "<u1", (1024,))])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
FOOTER = np.dtype([("magic", "S8"), ("size", "<u4"), ("notes_crc32", "<u4"), ("tables_crc32", "<u4"), ("zero", "<u4")])
MAGIC = b"VADITNT1"
NOTES_FORMAT = "vadit-beton"
_JOURNAL_FORMAT = "vadit-beton-journal"

Kind = Literal["float", "int", "image", "bytes", "array", "json", "tensor"]
KINDS: tuple[Kind, ...] = ("float", "int", "image", "bytes", "array", "json", "tensor")
"""By FFCV's type number."""
_SIZED = np.dtype([("ptr", "<u8"), ("size", "<u8")])
ROW_TYPES: dict[Kind, np.dtype[Any]] = {
    "float": np.dtype("<f8"),
    "int": np.dtype("<i8"),
    "image": IMAGE,
    "bytes": _SIZED,
    "array": np.dtype("<u8"),
    "json": _SIZED,
    "tensor": np.dtype("<u8"),
}


@dataclass(frozen=True)
class Field:
    """A column of the file. `size` is an array's number of bytes (arrays of ours are uint8 of one dimension)."""

    name: str
    kind: Kind
    size: int = 0


IMAGE_FIELDS = (Field("image", "image"), Field("label", "int"))
"""The fields of a file of images; the writer adds crc32."""
CRC_FIELD = Field("crc32", "int")


@dataclass(frozen=True)
class EncodedImage:
    """An image as it lies in the file. Worker processes make it, the one writer appends it."""

    mode: Literal["jpg", "raw"]
    width: int
    height: int
    data: bytes | memoryview
    """The file of a JPEG, or height x width x 3 bytes of pixels."""


Value = int | EncodedImage | bytes | memoryview


def encode_image(image: Image.Image, mode: Literal["jpg", "raw"], quality: int = 95) -> EncodedImage:
    """Pillow's RGB image for the file; `quality` is that of a JPEG (4:4:4, colour is not thinned out)."""
    if image.mode != "RGB":
        raise ValueError(f"the image is {image.mode}; convert it to RGB first")
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels is longer than {MAX_SIDE}, the most a beton holds")
    if mode == "raw":
        data = image.tobytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        data = buffer.getvalue()
    return EncodedImage(mode, image.width, image.height, data)


def row_type(kinds: Sequence[Kind]) -> np.dtype[Any]:
    """The type of one row of the table, columns f0, f1, ..."""
    return np.dtype([(f"f{number}", ROW_TYPES[kind]) for number, kind in enumerate(kinds)], align=True)


def row_crc32(values: Sequence[Value]) -> int:
    """Checksum of a sample: of each value in the fields' order, numbers and sizes as 8 bytes, then the payload."""
    checksum = 0
    for value in values:
        if isinstance(value, int):
            checksum = zlib.crc32(value.to_bytes(8, "little", signed=True), checksum)
        elif not isinstance(value, EncodedImage):
            checksum = zlib.crc32(value, checksum)
        else:
            shape = (JPG if value.mode == "jpg" else RAW, value.width, value.height)
            checksum = zlib.crc32(b"".join(number.to_bytes(8, "little") for number in shape), checksum)
            checksum = zlib.crc32(value.data, checksum)
    return checksum


class BetonWriter:
    """Writes a .beton sample by sample; a killed run goes on where it was.

        with BetonWriter(path, IMAGE_FIELDS, max_samples=len(items), settings={"source": ..., "size": 256}) as writer:
            for item in items[writer.done:]:              # `done` items are in the file or noted as skipped
                try:
                    writer.append(encode_image(...), label)   # in worker processes: encode_image; here: append
                except RunError as error:
                    writer.skip(name, str(error))
            writer.finish({"classes": [...]})

    A page goes to `path.partial`, and once it is on the disk its rows go to `path.partial.journal`, as a line of JSON
    that counts only when it is whole: pages begin with the same samples wherever a run was killed. A block that is left
    without `finish` keeps both, and the next writer with the same arguments goes on from them (`resume=False` begins
    anew): up to a page of samples is done again. `finish` writes the tables and gives the file its name, so that it is
    whole or not there. `max_samples` bounds the samples (room for their rows is kept in front).
    `settings` must hold whatever the content depends on (JSON values): another writer's parts are refused by it.

    UsageError: the parts belong to other settings, or another process writes them. RunError: the disk.
    """

    def __init__(
        self,
        path: str | Path,
        fields: Sequence[Field] = IMAGE_FIELDS,
        *,
        max_samples: int,
        settings: Mapping[str, Any] | None = None,
        page_size: int = PAGE_SIZE,
        resume: bool = True,
    ) -> None:
        if page_size not in (1 << bit for bit in range(21, 32)):
            raise UsageError(f"page_size is {page_size}; it must be a power of two from 2 MiB to 2 GiB")
        self.path = Path(path)
        self.fields = (*fields, CRC_FIELD)
        self.skipped: dict[str, str] = {}
        """Name of each item that `skip` noted, with the reason."""
        self._page_size = page_size
        self._max_samples = max_samples
        self._row_type = row_type([field.kind for field in self.fields])
        front = HEADER.itemsize + len(self.fields) * FIELD.itemsize + max_samples * self._row_type.itemsize
        self._data_start = _round_up(front, page_size)
        self._rows, self._allocations = bytearray(), bytearray()  # as in the file: tuples would take a kilobyte each
        self._page = bytearray()
        self._page_start = self._data_start
        self._lines: list[str] = []
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._journal_path = self.path.with_name(self.path.name + ".partial.journal")
        self._head = {
            "format": _JOURNAL_FORMAT,
            "settings": dict(settings or {}),
            "fields": [[field.name, field.kind, field.size] for field in self.fields],
            "max_samples": max_samples,
            "page_size": page_size,
        }
        self._open(resume=resume)

    @property
    def num_samples(self) -> int:
        """Samples in the file so far."""
        return len(self._rows) // self._row_type.itemsize

    @property
    def done(self) -> int:
        """Items handled so far: samples and skipped ones."""
        return self.num_samples + len(self.skipped)

    def append(self, *values: Value) -> None:
        """Add a sample: one value per field, without crc32. RunError: it does not fit a page, or the disk is full."""
        if len(values) != len(self.fields) - 1:
            raise ValueError(f"{len(values)} values for {len(self.fields) - 1} fields")
        if self.num_samples == self._max_samples:
            raise ValueError(f"more than max_samples {self._max_samples} samples")
        payloads = [_payload(field, value) for field, value in zip(self.fields, values, strict=False)]
        need = sum(_round_up(len(payload), ALIGNMENT) for payload in payloads if payload is not None)
        if need > self._page_size:
            raise RunError(
                f"a sample of {need} bytes does not fit the {self._page_size} bytes of a page of {self.path}; "
                "store JPEG, or a smaller size"
            )
        if len(self._page) + need > self._page_size:
            self._flush_page()
        row: list[Any] = []
        spans: list[tuple[int, int]] = []
        for value, payload in zip(values, payloads, strict=True):
            ptr = self._page_start + len(self._page)
            if payload is not None:
                self._page += payload
                self._page += bytes(-len(payload) % ALIGNMENT)
                spans.append((ptr, len(payload)))
            row.append(_row_value(value, ptr))
        row.append(row_crc32(values))
        self._record(row, spans)
        self._lines.append(json.dumps({"row": row, "spans": spans}))

    def skip(self, name: str, reason: str) -> None:
        """Note that an item is not in the file, and why; it counts as done."""
        if name in self.skipped:
            raise ValueError(f"{name} is skipped twice")
        self.skipped[name] = reason
        self._lines.append(json.dumps({"skip": name, "why": reason}))

    def finish(self, notes: Mapping[str, Any] | None = None) -> None:
        """Write the tables and give the file its name. `notes` (JSON values) come back from the reader.

        RunError: there are no samples, or the disk is full.
        """
        if not self._rows:
            raise RunError(f"{self.path} would hold no samples; nothing was written")
        self._flush_page()
        header = np.zeros(1, HEADER)
        text = json.dumps({"format": NOTES_FORMAT, **(notes or {})}).encode()
        footer = np.zeros(1, FOOTER)
        header[0] = (
            VERSION,
            len(self.fields),
            self._page_size,
            self.num_samples,
            self._page_start + len(text) + FOOTER.itemsize,
        )
        front = header.tobytes() + b"".join(_describe(field) for field in self.fields) + self._rows
        allocations = bytes(self._allocations)
        footer[0] = (MAGIC, len(text), zlib.crc32(text), zlib.crc32(allocations, zlib.crc32(front)), 0)
        try:
            self._data.seek(self._page_start)
            self._data.write(text + footer.tobytes() + allocations)
            self._data.seek(0)
            self._data.write(front)
            self._data.flush()
            os.fsync(self._data.fileno())
            self._data.close()
            os.replace(self._partial, self.path)
            self._journal_path.unlink()
        except OSError as error:
            raise self._fault(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Leave the parts as they are, for another writer to go on from."""
        self._data.close()
        self._journal.close()

    def discard(self) -> None:
        """Remove the parts."""
        self.close()
        self._partial.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, *, resume: bool) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._journal: BinaryIO = open(self._journal_path, "a+b")  # noqa: SIM115 (closed by close)
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._journal.close()
                raise UsageError(f"another process writes {self.path}; wait for it, or name another file") from None
            # made if it is missing, never cut: the journal says how much of it counts
            self._data: BinaryIO = open(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
            if not resume:
                self._journal.truncate(0)
            self._resume()
        except OSError as error:
            raise self._fault(error) from error

    def _resume(self) -> None:
        """Take over what the journal records, up to the first line that is not whole or whose payload is missing."""
        available = os.fstat(self._data.fileno()).st_size
        self._journal.seek(0)
        end = 0
        for number, line in enumerate(self._journal):
            try:
                entry: Any = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict if number == 0 else list):
                break
            if number == 0:
                try:
                    remedy = f"set it as it was, remove it and {self._journal_path.name}, or choose another name"
                    refuse_other_settings(self._partial, "images", entry, self._head, remedy)
                except UsageError:
                    self.close()
                    raise
            elif max((sum(span) for item in entry for span in item.get("spans", ())), default=0) > available:
                break
            else:
                self._take(entry)
            end += len(line)
        self._journal.truncate(end)
        self._data.truncate(self._page_start)
        if end == 0:
            self._journal.write(json.dumps(self._head).encode() + b"\n")
            self._journal.flush()

    def _take(self, page: Any) -> None:
        """The rows of a page, and what was skipped between them."""
        for item in page:
            if "skip" in item:
                self.skipped[item["skip"]] = item["why"]
                continue
            spans = [(int(ptr), int(size)) for ptr, size in item["spans"]]
            self._record(item["row"], spans)
            stop = max((ptr + size for ptr, size in spans), default=self._page_start)
            self._page_start = max(self._page_start, _round_up(stop, self._page_size))

    def _record(self, row: Sequence[Any], spans: Sequence[tuple[int, int]]) -> None:
        sample = self.num_samples
        entry = np.zeros(1, self._row_type)  # zeros: the bytes between the columns count in the tables' checksum
        entry[0] = tuple(tuple(value) if isinstance(value, list) else value for value in row)
        self._rows += entry.tobytes()
        self._allocations += np.array([(sample, ptr, size) for ptr, size in spans], ALLOCATION).tobytes()

    def _flush_page(self) -> None:
        """The page to the disk, then its rows to the journal; the next page begins."""
        try:
            if self._page:
                self._data.seek(self._page_start)
                self._data.write(self._page)
                self._data.flush()
                self._data.truncate(self._page_start + self._page_size)
                os.fsync(self._data.fileno())
                self._page_start += self._page_size
                self._page = bytearray()
            if self._lines:
                self._journal.write(f"[{','.join(self._lines)}]\n".encode())
            self._journal.flush()
            self._lines = []
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> RunError:
        return RunError(
            f"{self.path} cannot be written ({write_fault(error)}); make room or give permission, then start again: "
            "it goes on where it was"
        )


def _payload(field: Field, value: Value) -> bytes | memoryview | None:
    """The bytes that go to a page (None: the row holds the value), after a check that the value suits the field."""
    if field.kind == "image" and isinstance(value, EncodedImage):
        if (value.mode == "raw" and len(value.data) != value.width * value.height * 3) or not value.data:
            raise ValueError(f"{len(value.data)} bytes for {value.width} x {value.height} pixels")
        return value.data
    if field.kind == "array" and isinstance(value, (bytes, memoryview)) and len(value) == field.size > 0:
        return value
    if field.kind == "int" and isinstance(value, int):
        return None
    raise ValueError(f"field {field.name} ({field.kind}, {field.size} bytes) cannot take {type(value).__name__}")


def _row_value(value: Value, ptr: int) -> Any:
    if isinstance(value, EncodedImage):
        return (JPG if value.mode == "jpg" else RAW, value.width, value.height, ptr)
    return value if isinstance(value, int) else ptr


def _describe(field: Field) -> bytes:
    """The field's descriptor. An array's arguments: 32 dimensions, the length of its type's JSON, that JSON."""
    entry = np.zeros(1, FIELD)
    entry["kind"] = KINDS.index(field.kind)
    entry["name"] = field.name.encode("ascii")
    if field.kind == "array":
        kind = json.dumps(np.dtype("u1").descr).encode()
        arguments = np.array([field.size] + [0] * 31 + [len(kind)], "<u8").tobytes() + kind
        entry["arguments"][0, : len(arguments)] = np.frombuffer(arguments, np.uint8)
    return entry.tobytes()


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
