"""What lies where in a WebDataset shard: one walk over the headers of a .tar, kept beside it as NAME.tar.index.

Members with the same path up to the first dot of the file's name are one sample (WebDataset's rule): its image by the
extension, its label from `.cls` (a whole number in ASCII) or from "label" or "cls" of `.json`. The index is a cache: it
is made anew where the shard's size or time of change differ, or where its own checksum does not fit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vadit.runtime.errors import RunError

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
)
MAX_CLASSES = 1_000_000
NO_LABEL = -1
NOTE_MEMBER = ".vadit.json"
"""Last member of the shards that `TarShardWriter` made: number of images, and its caller's notes."""

RECORD = np.dtype(
    [("header", "<i8"), ("start", "<i8"), ("size", "<i8"), ("label", "<i4"), ("crc32", "<u4"), ("checked", "?")]
)
"""An image: position of its (first) header, of its bytes, their number, label, and CRC-32 where `checked`."""

BLOCK = 512
_WINDOW = 4096
_MAGIC = b"vadit-tar-index 1 "
_MAX_TEXT_BYTES = 1 << 24
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_WITHOUT_DATA = (*_LINKS, b"3", b"4", b"5", b"6")
_EXTENDED = (b"L", b"K", b"x", b"X", b"g")


@dataclass(frozen=True)
class Member:
    """One entry of a .tar."""

    header: int
    """Byte where its first header begins; long names come in headers of their own before the main one."""
    start: int
    size: int
    name: bytes
    kind: bytes
    owner: bytes
    """Names of user and group, 32 bytes each; ours hold label and CRC-32."""


@dataclass
class ShardIndex:
    """The samples of a shard, in the order of their images, and what of it cannot be used."""

    records: np.ndarray
    bad: dict[str, str] = field(default_factory=dict)
    """Sample (or "from byte N on") -> why."""
    note: dict[str, Any] | None = None
    """What the shard's writer noted (`TarShardWriter`)."""
    stamp: dict[str, int] = field(default_factory=dict)
    """Size and time of change of the shard that this is the index of."""


class Damaged(Exception):
    """The shard cannot be followed from byte `position` on."""

    def __init__(self, position: int, why: str) -> None:
        super().__init__(why)
        self.position = position


def shard_index(path: Path) -> ShardIndex:
    """The index of a shard, from the file beside it where that is right; RunError where the shard cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            stamp = stamp_of(file.fileno())
            cached = _load(index_path(path), stamp)
            if cached is not None:
                return cached
            index = walk(file.fileno(), stamp["bytes"])
    except OSError as error:
        raise RunError(f"shard {path} cannot be read ({error.strerror}); give read permission or replace it") from None
    index.stamp = stamp
    _save(path, index)
    return index


def stamp_of(descriptor: int) -> dict[str, int]:
    """What tells an open file from one that was put in its place."""
    status = os.fstat(descriptor)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def index_path(path: Path) -> Path:
    """Where the index of a shard lies."""
    return path.with_name(path.name + ".index")


def _save(path: Path, index: ShardIndex) -> None:
    """Keep the index of shard `path`; a folder that cannot be written to goes without."""
    head = json.dumps({"stamp": index.stamp, "bad": index.bad, "note": index.note}).encode()
    content = head + b"\n" + index.records.tobytes()
    target = index_path(path)
    # several processes may open new shards at once, so each writes a file of its own
    partial = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.write_bytes(_MAGIC + b"%08x\n" % zlib.crc32(content) + content)
        os.replace(partial, target)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def _load(path: Path, stamp: dict[str, int]) -> ShardIndex | None:
    """The index that was kept, where it is whole and of this very shard."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + 9
    if content[:start] != _MAGIC + b"%08x\n" % zlib.crc32(content[start:]):
        return None
    end = content.index(b"\n", start)
    head = json.loads(content[start:end])
    if head["stamp"] != stamp:
        return None
    return ShardIndex(np.frombuffer(content, RECORD, offset=end + 1), head["bad"], head["note"], stamp)


# ------------------------------------------------------------------------------------------------ samples


class _Sample:
    """The members of one key."""

    __slots__ = ("images", "json", "label", "names", "others", "why")

    def __init__(self) -> None:
        self.images: list[Member] = []  # 17.jpg
        self.others: list[Member] = []  # 17.left.jpg: the image where there is no shorter one
        self.names: set[bytes] = set()
        self.label: Member | None = None
        self.json: Member | None = None
        self.why = ""

    def take(self, member: Member, extension: bytes) -> None:
        last = extension.rpartition(b".")[2].decode(errors="replace")
        if last not in IMAGE_EXTENSIONS and extension not in (b"cls", b"json"):
            return  # texts, masks, features: not ours
        if member.kind not in _REGULAR:
            kind = "a link" if member.kind in _LINKS else "no plain file"
            self.why = f"{text(member.name)} is {kind}; make the shard with tar --dereference --hard-dereference"
        if extension in self.names:
            self.why = f"{text(member.name)} is there twice; give every sample a name of its own"
        self.names.add(extension)
        if extension == b"cls":
            self.label = member
        elif extension == b"json":
            self.json = member
        else:
            (self.others if b"." in extension else self.images).append(member)

    def record(self, reader: Window) -> list[tuple[Any, ...]]:
        """The RECORD of the image, or nothing where there is none; ValueError says what is wrong."""
        if self.why:
            raise ValueError(self.why)
        found = self.images or self.others
        if len(found) > 1:
            names = " and ".join(text(member.name) for member in found[:2])
            raise ValueError(f"one sample has several images ({names}); a sample's name ends at the first dot")
        if not found:
            if self.label is not None:
                raise ValueError(f"there is a label but no image ({' '.join(sorted(IMAGE_EXTENSIONS))})")
            return []
        image, label = found[0], NO_LABEL
        if self.label is not None:
            label = _label(reader.read(self.label.start, min(self.label.size, 64)))
        elif self.json is not None:
            content = _json(reader, self.json)
            given = [content[name] for name in ("label", "cls") if name in content]
            label = _label(str(given[0]).encode()) if given else NO_LABEL
        crc32 = _stated(image.owner, rb"crc32=([0-9a-f]{8})", 16)
        if crc32 is not None and label != _stated(image.owner, rb"label=(\d+)", 10):
            raise ValueError(f"the label is {label}, which is not the one that the image's header states")
        return [(image.header, image.start, image.size, label, crc32 or 0, crc32 is not None)]


def walk(descriptor: int, num_bytes: int) -> ShardIndex:
    """Read all headers of the open shard; the bytes of images are not read.

    Left out without a word: folders, links and devices that are not named like images or labels, members of other
    kinds (.txt, .npy), files whose name begins with a dot, and texts without an image.
    """
    reader = Window(descriptor, num_bytes)
    samples: dict[bytes, _Sample] = {}
    bad: dict[str, str] = {}
    note: Member | None = None
    try:
        for member in members(reader):
            if member.name == NOTE_MEMBER.encode():
                note = member
            key, extension = split_name(member.name)
            if key and extension and member.kind != b"5":
                samples.setdefault(key, _Sample()).take(member, extension)
    except Damaged as error:
        bad[f"from byte {error.position} on"] = str(error)
    rows: list[tuple[Any, ...]] = []
    for key, sample in samples.items():
        try:
            rows += sample.record(reader)
        except (ValueError, Damaged) as error:
            bad[text(key)] = str(error)
    content = None
    if note is not None:
        try:
            content = _json(reader, note)
            count = sum(bool(sample.images) for sample in samples.values())
            if content.get("images") != count:
                bad[NOTE_MEMBER] = f"the shard should hold {content.get('images')} images, {count} are found"
        except (ValueError, Damaged) as error:
            bad[NOTE_MEMBER] = str(error)
    return ShardIndex(np.array(sorted(rows), RECORD), bad, content)


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Key and lower-case extension of a member: its path cut at the first dot of the file's name."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return (folder + slash + stem if stem else b""), extension.lower()


def text(name: bytes) -> str:
    """A member's name for people."""
    return name.decode(errors="backslashreplace")


def _stated(owner: bytes, pattern: bytes, base: int) -> int | None:
    """A number that the writer put into a header."""
    found = re.match(pattern + rb"\0", owner) or re.search(rb"\0" + pattern + rb"\0", owner)
    return int(found[1], base) if found else None


def _label(content: bytes) -> int:
    digits = content.strip()
    if not digits.isdigit():
        raise ValueError(f"the label is {text(content)[:40]!r}; it must be a whole number, at least 0")
    if len(digits) > 9 or int(digits) >= MAX_CLASSES:
        raise ValueError(f"the label is {text(digits)[:40]}; the highest possible is {MAX_CLASSES - 1}")
    return int(digits)


def _json(reader: Window, member: Member) -> dict[str, Any]:
    if member.size > _MAX_TEXT_BYTES:
        raise ValueError(f"{text(member.name)} has {member.size} bytes, too many for a .json of labels")
    try:
        content = json.loads(reader.read(member.start, member.size))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text(member.name)} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{text(member.name)} is no JSON object")
    return content


# ------------------------------------------------------------------------------------------------ headers


class Window:
    """Reads of an open file, few system calls for headers that lie close together."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._descriptor = descriptor
        self._start = 0
        self._bytes = b""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; Damaged where the file ends before."""
        inside = start - self._start
        if inside < 0 or inside + size > len(self._bytes):
            self._start, inside = start, 0
            self._bytes = read_all(self._descriptor, start, max(size, _WINDOW))
        found = self._bytes[inside : inside + size]
        if len(found) < size:
            raise Damaged(start, f"the file ends at byte {self.num_bytes}, inside a member: it was cut short")
        return found


def read_all(descriptor: int, start: int, size: int) -> bytes:
    """Up to `size` bytes from `start` on; fewer only where the file ends."""
    data = os.pread(descriptor, size, start)
    while len(data) < size:  # network file systems may hand out less at a time
        more = os.pread(descriptor, size - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def members(reader: Window, position: int = 0) -> Iterator[Member]:
    """The members of a .tar from the header at `position` on; Damaged where it cannot be followed.

    POSIX (ustar, PAX) and GNU (long names, sizes in base 256) formats.
    """
    if reader.num_bytes == 0:
        raise Damaged(0, "the file is empty")
    shared: dict[str, bytes] = {}
    extended: dict[str, bytes] = {}
    first = position  # of the member's headers
    while True:
        if position + BLOCK > reader.num_bytes:
            raise Damaged(first, f"the file ends at byte {reader.num_bytes} without an end marker: it was cut short")
        block = reader.read(position, BLOCK)
        if not block.strip(b"\0"):
            _check_end(reader, position)
            return
        name, size, kind = _header(block, position)
        start = position + BLOCK
        if kind in _EXTENDED:
            if size > _MAX_TEXT_BYTES:
                raise Damaged(first, f"the extended header at byte {position} has {size} bytes")
            content = reader.read(start, size)
            if kind == b"L":
                extended["path"] = content.split(b"\0")[0]
            elif kind != b"K":
                (shared if kind == b"g" else extended).update(_pax(content, position))
        else:
            name = extended.get("path", shared.get("path", name))
            size = 0 if kind in _WITHOUT_DATA else _pax_size(extended, size, position)
            if start + size > reader.num_bytes:
                raise Damaged(
                    first, f"{text(name)} should end at byte {start + size}, the file at {reader.num_bytes}: cut short"
                )
            sparse = any(key.startswith("GNU.sparse") for key in extended)
            kind = b"S" if sparse else b"5" if name.endswith(b"/") and kind in _REGULAR else kind
            yield Member(first, start, size, name, kind, block[265:329])
            extended = {}
        position = start + -(-size // BLOCK) * BLOCK
        first = first if extended else position


def _header(block: bytes, position: int) -> tuple[bytes, int, bytes]:
    """Name, size and kind of a header block; its checksum counts its own field as spaces."""
    if position == 0 and block[:2] == b"\x1f\x8b":
        raise Damaged(0, "it is compressed, so that no sample can be read alone; unpack it with gunzip")
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    stated = _octal(block[148:156])
    # Old writers summed signed bytes.
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        what = "no .tar header" if position == 0 else "a damaged header"
        raise Damaged(position, f"there is {what} at byte {position}: its checksum does not fit")
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else _octal(block[124:136])
    if size is None:
        raise Damaged(position, f"the header of {text(name)} at byte {position} states no size")
    return name, size, block[156:157]


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _pax(content: bytes, position: int) -> dict[str, bytes]:
    """Records "LENGTH KEY=VALUE\\n" of a PAX header."""
    found: dict[str, bytes] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if not equals or length > len(content) or not value.endswith(b"\n"):
            raise Damaged(position, f"the extended header at byte {position} is damaged")
        found[key.decode(errors="replace")] = value[:-1]
        content = content[length:]
    return found


def _pax_size(extended: dict[str, bytes], size: int, position: int) -> int:
    given = extended.get("size")
    if given is None:
        return size
    if not given.isdigit() or len(given) > 18:
        raise Damaged(position, f"the extended header before byte {position} states no size")
    return int(given)


def _check_end(reader: Window, position: int) -> None:
    """After the end marker there are zeros alone, or samples would be lost in silence."""
    while position < reader.num_bytes:
        block = reader.read(position, min(_WINDOW, reader.num_bytes - position))
        if block.strip(b"\0"):
            raise Damaged(
                position, f"there is data behind the end marker at byte {position}; join shards with tar --concatenate"
            )
        position += len(block)
