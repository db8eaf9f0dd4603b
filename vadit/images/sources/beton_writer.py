"""Writes a .beton of images (`beton` has the format) without ffcv; a killed writer goes on where it was."""

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from PIL import Image

from vadit.images.sources import beton
from vadit.images.sources.beton import OUR_FIELDS, EncodedImage
from vadit.runtime.errors import RunError, write_fault
from vadit.runtime.files import no_link, refuse_other_settings
from vadit.runtime.json_files import Count, Limits, parse_json
from vadit.runtime.owner import NAME, held

PAGE_SIZE = 8 << 20
MAX_SIDE = (1 << 16) - 1
ALIGNMENT = 64  # payloads begin at multiples of it
GOES_ON = "make room or give permission, then start again: it goes on where it was"
_ROW = beton.row_type(OUR_FIELDS)

_Short = Annotated[int, Limits(strict=True, ge=0, lt=1 << 16)]


@dataclass(frozen=True)
class _Page:
    """A line of the journal: the rows of a page with their payloads' bytes, and what was skipped on the way."""

    rows: list[tuple[tuple[tuple[Literal[0, 1], _Short, _Short, Count], Count, Count], Count]]
    skipped: dict[str, str]


def encode_image(image: Image.Image, mode: Literal["jpg", "raw"], quality: int = 95) -> EncodedImage:
    """Pillow's RGB image for the file; `quality` is that of a JPEG (4:4:4, colour is not thinned out)."""
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels is longer than {MAX_SIDE}, the most a beton holds")
    if mode == "raw":
        data = image.tobytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        data = buffer.getvalue()
    return EncodedImage(mode, image.width, image.height, data)


class BetonWriter:
    """Writes a .beton image by image; a killed run goes on where it was.

        with BetonWriter(path, max_samples=len(items), settings={"source": ..., "size": 256}) as writer:
            for item in items[writer.done:]:  # `done` items are in the file or noted as skipped
                writer.append(encode_image(...), label)  # or skip(name, why)
            writer.finish({"classes": [...]})

    A page goes to `path.partial`, and once it is on the disk its rows go to `path.partial.journal`, as a line of JSON
    that counts only when it is whole: pages begin with the same samples wherever a run was killed. A block that is left
    without `finish` keeps both, and the next writer with the same arguments goes on from them. `max_samples` bounds the
    samples (room for their rows is kept in front). `settings` must hold whatever the content depends on (JSON values):
    another writer's parts are refused by it.

    UsageError: the parts belong to other settings, or another process writes them. RunError: the disk.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_samples: int,
        settings: Mapping[str, Any] | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.path = Path(path)
        self.skipped: dict[str, str] = {}  # name of each item that `skip` noted, with the reason
        self._page_size = page_size
        self._max_samples = max_samples
        front = beton.HEADER.itemsize + len(OUR_FIELDS) * beton.FIELD.itemsize + max_samples * _ROW.itemsize
        self._rows, self._allocations = bytearray(), bytearray()  # as in the file: tuples would take a kilobyte each
        self._page = bytearray()
        self._page_start = _round_up(front, page_size)
        self._news: dict[str, Any] = {"rows": [], "skipped": {}}
        """What the journal does not record yet: (row, bytes) of each sample, and what was skipped."""
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._journal_path = self.path.with_name(self.path.name + ".partial.journal")
        head = {"settings": dict(settings or {}), "max_samples": max_samples, "page_size": page_size}
        with ExitStack() as stack, self._disk():
            stack.enter_context(held(self._partial.with_suffix(NAME), self.path, "name another file"))
            self._journal: BinaryIO = stack.enter_context(open(self._journal_path, "a+b", opener=no_link))
            # made if it is missing, never cut: the journal says how much of it counts
            self._data: BinaryIO = stack.enter_context(open(no_link(self._partial, os.O_RDWR | os.O_CREAT), "r+b"))
            self._resume(head)
            self._open = stack.pop_all()

    @property
    def num_samples(self) -> int:
        """Samples in the file so far."""
        return len(self._rows) // _ROW.itemsize

    @property
    def done(self) -> int:
        """Items handled so far: samples and skipped ones."""
        return self.num_samples + len(self.skipped)

    def append(self, image: EncodedImage, label: int) -> None:
        """Add a sample, which fits a page. RunError: the disk is full."""
        num_bytes = len(image.data)
        need = _round_up(num_bytes, ALIGNMENT)
        if not 0 < need <= self._page_size:
            raise ValueError(f"{num_bytes} bytes do not fit a page of {self._page_size}")
        if self.num_samples == self._max_samples:
            raise ValueError(f"more than max_samples {self._max_samples} samples")
        if len(self._page) + need > self._page_size:
            self._flush_page()
        ptr = self._page_start + len(self._page)
        self._page += image.data
        self._page += bytes(need - num_bytes)
        mode = beton.JPG if image.mode == "jpg" else beton.RAW
        row = [[mode, image.width, image.height, ptr], label, beton.row_crc32(image, label)]
        self._record(row, num_bytes)
        self._news["rows"].append((row, num_bytes))

    def skip(self, name: str, reason: str) -> None:
        """Note that an item is not in the file, and why; it counts as done."""
        self.skipped[name] = self._news["skipped"][name] = reason

    def finish(self, notes: Mapping[str, Any] | None = None) -> None:
        """Write the tables and give the file its name. `notes` (JSON values) come back from the reader.

        RunError: there are no samples, or the disk is full.
        """
        if not self._rows:
            raise RunError(f"{self.path} would hold no samples; nothing was written")
        self._flush_page()
        header, footer = np.zeros(1, beton.HEADER), np.zeros(1, beton.FOOTER)
        fields = np.zeros(len(OUR_FIELDS), beton.FIELD)
        fields["kind"] = [beton.KINDS.index(field.kind) for field in OUR_FIELDS]
        fields["name"] = [field.name.encode() for field in OUR_FIELDS]
        text = json.dumps(notes or {}).encode()
        table = self._page_start + len(text) + beton.FOOTER.itemsize
        header[0] = (beton.VERSION, len(OUR_FIELDS), self._page_size, self.num_samples, table)
        front = header.tobytes() + fields.tobytes() + self._rows
        footer[0] = (beton.MAGIC, len(text), zlib.crc32(text), zlib.crc32(self._allocations, zlib.crc32(front)), 0)
        with self._disk():
            self._data.seek(self._page_start)
            self._data.write(text + footer.tobytes() + self._allocations)
            self._data.seek(0)
            self._data.write(front)
            self._data.flush()
            os.fsync(self._data.fileno())
            os.posix_fadvise(self._data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # who verifies it reads the disk
            os.replace(self._partial, self.path)
            self._journal_path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _resume(self, head: dict[str, Any]) -> None:
        """Take over what the journal records, up to the first line that is not whole or whose payload is missing."""
        available = os.fstat(self._data.fileno()).st_size
        self._journal.seek(0)
        end = 0
        for line in self._journal:
            kind: Any = _Page if end else dict[str, Any]
            try:  # a line without its end is no JSON then
                entry = parse_json(line[:-1], kind, str(self._journal_path))
            except RunError:
                break
            if end == 0:
                remedy = f"set it as it was, remove it and {self._journal_path.name}, or choose another name"
                refuse_other_settings(self._partial, "images", entry, head, remedy)
            elif any(row[0][-1] + size > available for row, size in entry.rows):
                break
            else:
                self.skipped |= entry.skipped
                for row, size in entry.rows:
                    self._record(row, size)
                self._page_start += self._page_size if entry.rows else 0
            end += len(line)
        self._journal.truncate(end)
        self._data.truncate(self._page_start)
        if end == 0:
            self._journal.write(json.dumps(head).encode() + b"\n")
            self._journal.flush()

    def _record(self, row: Sequence[Any], num_bytes: int) -> None:
        entry = np.zeros(1, _ROW)  # zeros: the bytes between the columns count in the tables' checksum
        entry[0] = (tuple(row[0]), *row[1:])
        self._allocations += np.array([(self.num_samples, row[0][-1], num_bytes)], beton.ALLOCATION).tobytes()
        self._rows += entry.tobytes()

    def _flush_page(self) -> None:
        """The page to the disk, then its rows to the journal; the next page begins."""
        with self._disk():
            if self._page:
                self._data.seek(self._page_start)
                self._data.write(self._page)
                self._data.flush()
                self._data.truncate(self._page_start + self._page_size)
                os.fsync(self._data.fileno())
                self._page_start += self._page_size
                self._page = bytearray()
            if any(self._news.values()):
                self._journal.write(json.dumps(self._news).encode() + b"\n")
                self._journal.flush()
            self._news = {"rows": [], "skipped": {}}

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """One sentence of what the disk refuses."""
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({write_fault(error)}); {GOES_ON}") from error


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
