"""What lies where in a WebDataset shard: one walk over the headers of a .tar, kept beside it as NAME.tar.index.

Members with the same path up to the first dot of the file's name are one sample (WebDataset's rule): its image by the
extension, its label from `.cls` (a whole number in ASCII; `.NAME.cls` where there is one alone) or from "label" or
"cls" of `.json`; `.txt` is a caption by WebDataset's custom. The index is a cache, an .npz: it is made anew where the
shard's size or time of change differ, or where it is damaged (zip has checksums).
"""

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vadit.images.formats import EXTENSIONS
from vadit.images.sources.labels import MAX_CLASSES
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import whole_file
from vadit.runtime.json_files import MAX_BYTES, parse_json
from vadit.runtime.npz_files import Npz
from vadit.runtime.reading import patiently, read_all, readable
from vadit.runtime.walk import is_hidden

IMAGE_EXTENSIONS = frozenset(extension[1:] for extension in EXTENSIONS)
MAX_OTHERS = 20
NO_LABEL = -1
RECORD = np.dtype([("header", "<i8"), ("start", "<i8"), ("size", "<i8"), ("label", "<i4")])
"""An image: position of its (first) header, of its bytes, their number, label."""

BLOCK = tarfile.BLOCKSIZE
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_LONG_TYPES = (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
MAX_LONG = 1 << 20  # bytes of a header of those types


class Member(NamedTuple):
    """A file of a .tar."""

    header: int  # byte where its first header begins; long names come in headers of their own before the main one
    start: int
    size: int
    name: str
    kind: str  # what it is, where it is not the bytes of a file: "a link", "no plain file"


@dataclass
class ShardIndex:
    """The samples of a shard, in the order of their images, and what of it cannot be used."""

    records: np.ndarray
    bad: dict[str, str] = field(default_factory=dict)  # sample (or "from byte N on") -> why
    others: dict[str, int] = field(default_factory=dict)  # members that are neither images nor labels, by extension
    stamp: list[int] = field(default_factory=list)  # size and time of change of the shard that this is the index of


class Damaged(Exception):
    """The shard cannot be followed from byte `position` on."""

    def __init__(self, position: int, why: str) -> None:
        super().__init__(why)
        self.position = position


def shard_index(path: Path) -> ShardIndex:
    """The index of a shard, from the file beside it where that is right; RunError where the shard cannot be read."""
    with readable(f"shard {path}", "give read permission or replace it"):
        return patiently(lambda: _shard_index(path), path)


def _shard_index(path: Path) -> ShardIndex:
    with open(path, "rb") as file:
        stamp = stamp_of(os.fstat(file.fileno()))
        index = _load(index_path(path), stamp)
        if index is None:
            index = walk(file)
            index.stamp = stamp
            _save(path, index)
    return index


def stamp_of(status: os.stat_result) -> list[int]:
    """By which a file differs from one that was put in its place: its size in bytes and its time of change."""
    return [status.st_size, status.st_mtime_ns]


def index_path(path: Path) -> Path:
    return path.with_name(path.name + ".index")


def _save(path: Path, index: ShardIndex) -> None:
    """Keep the index of shard `path`; a folder that cannot be written to goes without.

    Processes that open a new shard at once write the same bytes.
    """
    with contextlib.suppress(OSError), whole_file(index_path(path)) as partial, partial.open("wb") as file:
        bad, others = (np.array(json.dumps(value)) for value in (index.bad, index.others))
        np.savez(file, stamp=index.stamp, records=index.records, bad=bad, others=others)


def _load(path: Path, stamp: list[int]) -> ShardIndex | None:
    """The index that was kept, where it is whole and of this very shard."""
    try:
        kept = Npz(path)
        if kept.array("stamp", (2,)).tolist() != stamp:
            return None
        records = kept.array("records", (None,), "V").astype(RECORD, casting="no")
        bad = parse_json(str(kept.array("bad", (), "U")), dict[str, str], str(path))
        others = parse_json(str(kept.array("others", (), "U")), dict[str, int], str(path))
    except (RunError, UsageError, TypeError):  # there is none, or it is damaged
        return None
    header, start, size, label = (records[name] for name in ("header", "start", "size", "label"))
    inside = (header >= 0) & (header < start) & (size >= 0) & (start <= stamp[0] - size)
    labelled = (label >= NO_LABEL) & (label < MAX_CLASSES)
    is_sound = (inside & labelled).all() and (start[:-1] + size[:-1] <= header[1:]).all()
    return ShardIndex(records, bad, others, stamp) if is_sound else None


def walk(file: BinaryIO) -> ShardIndex:
    """Read all headers of the open shard; the bytes of images are not read.

    Left out without a word: folders, links and devices that are not named like images or labels, members of other
    kinds (.txt, .npy), what is hidden, and texts without an image.
    """
    samples: dict[str, list[tuple[str, Member]]] = {}
    others: dict[str, int] = {}
    bad: dict[str, str] = {}
    try:
        for member in members(file):
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            if any(map(is_hidden, member.name.split("/"))):
                continue
            is_read = extension.rpartition(".")[2] in IMAGE_EXTENSIONS | {"cls"}
            if is_read or extension == "json":
                samples.setdefault(folder + slash + stem, []).append((extension, member))
            ending = text(f".{extension}")
            if extension and not is_read and (ending in others or len(others) < MAX_OTHERS):
                others[ending] = others.get(ending, 0) + 1
    except Damaged as error:
        bad[f"from byte {error.position} on"] = str(error)
    rows: list[tuple[int, int, int, int]] = []
    for key, found in samples.items():
        try:
            rows += _record(found, file.fileno())
        except ValueError as error:
            bad[text(key)] = str(error)
    return ShardIndex(np.array(sorted(rows), RECORD), bad, dict(sorted(others.items())))


def _record(found: list[tuple[str, Member]], descriptor: int) -> list[tuple[int, int, int, int]]:
    """The RECORD of a sample's image, or nothing where there is none; ValueError says what is wrong.

    found: its members that are images or labels, by extension.
    """
    by_extension = dict(found)
    if len(by_extension) < len(found):
        twice = next(member for extension, member in found if member is not by_extension[extension])
        raise ValueError(f"{text(twice.name)} is there twice; give every sample a name of its own")
    for member in by_extension.values():
        if member.kind:
            remedy = "make the shard with tar --dereference --hard-dereference"
            raise ValueError(f"{text(member.name)} is {member.kind}; {remedy}")
    content = by_extension.pop("json", None)
    labels = {name: by_extension.pop(name) for name in list(by_extension) if name.rpartition(".")[2] == "cls"}
    label = labels.get("cls") or next(iter(labels.values()), None)
    if len(labels) > 1 and "cls" not in labels:
        raise ValueError(f"one sample has several labels ({' and '.join(labels)}); call the one that is meant .cls")
    # 17.left.jpg is the image where there is no 17.jpg
    images = [member for extension, member in by_extension.items() if "." not in extension]
    images = images or list(by_extension.values())
    if len(images) > 1:
        names = " and ".join(text(member.name) for member in images[:2])
        raise ValueError(f"one sample has several images ({names}); a sample's name ends at the first dot")
    if not images:
        if label is not None:
            raise ValueError(f"there is a label but no image ({' '.join(sorted(IMAGE_EXTENSIONS))})")
        return []
    number = NO_LABEL
    if label is not None:
        number = _label(read_all(descriptor, label.start, min(label.size, 64)))
    elif content is not None:
        data = read_all(descriptor, content.start, min(content.size, MAX_BYTES + 1))
        values = parse_json(data, dict[str, Any], text(content.name), error=ValueError, allow_nan=True)
        given = [values[name] for name in ("label", "cls") if name in values]
        number = _label(str(given[0]).encode()) if given else NO_LABEL
    return [(images[0].header, images[0].start, images[0].size, number)]


def text(name: str) -> str:
    """A member's name for people."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _label(content: bytes) -> int:
    digits, shown = content.strip(), content.decode(errors="backslashreplace")[:40]
    if not digits.isdigit() or len(digits) > 9 or int(digits) >= MAX_CLASSES:
        raise ValueError(f"the label is {shown!r}; it must be a whole number from 0 to {MAX_CLASSES - 1}")
    return int(digits)


def members(file: BinaryIO, position: int = 0) -> Iterator[Member]:
    """The files of a .tar from the headers at `position` on, without folders; Damaged where it cannot be followed.

    tarfile reads the headers, and stops in silence at one that it does not understand: what stands where it stopped is
    looked at.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    try:
        file.seek(position)
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while _check_long(file.fileno(), position) and (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
            plain = entry.isreg() and not entry.issparse()
            end = entry.offset_data + entry.size if plain else archive.offset
            if entry.size < 0 or end < entry.offset_data:
                raise Damaged(position, f"the header of {text(entry.name)} at byte {position} states no size")
            if plain and end > num_bytes:
                why = f"{text(entry.name)} should end at byte {end}, the file at {num_bytes}: cut short"
                raise Damaged(position, why)
            kind = "" if plain else "a link" if entry.islnk() or entry.issym() else "no plain file"
            if not entry.isdir():
                yield Member(position, entry.offset_data, entry.size, entry.name, kind)
            position = archive.offset
    except (Damaged, OSError):
        raise
    except Exception as error:  # tarfile's, or what nonsense in a header leads to inside it
        _check_end(file, position)
        raise Damaged(position, f"there is a damaged header at byte {position} ({error})") from None
    _check_end(file, position)


def _check_long(descriptor: int, position: int) -> bool:
    """Damaged where a header of a long name or a PAX header, which tarfile reads whole, is too long, or the latter is
    not all records "LENGTH KEY=VALUE\\n" (Python 3.11.9 does not ask)."""
    while True:
        try:
            header = tarfile.TarInfo.frombuf(os.pread(descriptor, BLOCK, position), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return True  # the end, or damage that tarfile finds
        if header.type not in _LONG_TYPES:
            return True
        if not 0 <= header.size <= MAX_LONG:
            raise Damaged(position, f"the extended header at byte {position} has {header.size:,} bytes")
        content = os.pread(descriptor, header.size, position + BLOCK) if header.type in _PAX_TYPES else b""
        while content.strip(b"\0"):
            digits = content.partition(b" ")[0]
            record = content[: int(digits)] if digits.isdigit() and len(digits) < 10 else b""
            if b"=" not in record or not record.endswith(b"\n"):
                raise Damaged(position, f"the extended header at byte {position} is damaged")
            content = content[len(record) :]
        position += BLOCK + -(-header.size // BLOCK) * BLOCK


def _check_end(file: BinaryIO, position: int) -> None:
    """Damaged where `position` is not the end of a .tar: a block of zeros, and nothing but zeros behind it."""
    num_bytes = os.fstat(file.fileno()).st_size
    file.seek(position)
    block = file.read(BLOCK)
    if position == 0 and block.startswith(b"\x1f\x8b"):
        raise Damaged(0, "it is compressed, so that no sample can be read alone; unpack it with gunzip")
    if len(block) < BLOCK:
        raise Damaged(position, f"the file ends at byte {num_bytes} without an end marker: it was cut short")
    if block.strip(b"\0"):
        what = "no .tar header" if position == 0 else "a damaged header"
        raise Damaged(position, f"there is {what} at byte {position}")
    while rest := file.read(1 << 16):
        if rest.strip(b"\0"):
            position = file.tell() - len(rest)
            why = f"there is data behind the end marker at byte {position}; join shards with tar --concatenate"
            raise Damaged(position, why)
