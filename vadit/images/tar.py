"""Images in WebDataset shards (.tar files, https://github.com/webdataset/webdataset), read at random and written.

`TarSource` reads any shards of samples KEY.jpg + KEY.cls (or KEY.json with "label" or "cls"); shards need not be
unpacked or read in order. `TarShardWriter` writes shards that any reader of WebDataset reads; label and CRC-32 of an
image stand also in its member's header, as names of user and group, where `TarSource` compares them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from vadit.images.tar_index import (
    BLOCK,
    IMAGE_EXTENSIONS,
    MAX_CLASSES,
    NO_LABEL,
    NOTE_MEMBER,
    Damaged,
    ShardIndex,
    Window,
    members,
    read_all,
    shard_index,
    stamp_of,
    text,
)
from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.runtime.files import whole_file

INDEX_THREADS = 8
MAX_OPEN_SHARDS = 128
MAX_SHARDS = 1_000_000
NOTE_FORMAT = "vadit-tar-shard"
CLASSES_FILE = "classes.json"
PREPARED_FILE = "prepare.json"
"""In folders of `vadit prepare`: what they are made with, and `shards`, once they are complete."""
REMEDY = "replace the shard, or leave out what is bad with --data.on-error skip (vadit prepare: --on-error skip)"


class TarSource:
    """The images of WebDataset shards as an ImageSource, in the order of the shards' names and of their members.

    `path` is a folder of *.tar, one .tar, or a pattern like images-{000000..000099}.tar. Classes are named by
    classes.json (a list) or classes.txt (a line each) beside the shards, else by their numbers; shards without any
    label are of one class, "all". What is wrong with a shard (cut short, a damaged header, a sample without label,
    with two images or with members of the same name, a link in an image's place) is told at once (on_error="raise"),
    or left out and noted in `bad_files` (on_error="skip"); of a shard that is cut or damaged the samples before that
    place are used then, and what lies behind it is one entry of `bad_files`.
    """

    def __init__(self, path: str | Path, *, on_error: Literal["raise", "skip"] = "raise") -> None:
        self.name = str(path)
        self.bad_files: dict[str, str] = {}
        """SHARD:MEMBER -> why it is left out."""
        self._on_error = on_error
        self._shards = find_shards(self.name)
        indices = self._read_indices()
        self._records = np.concatenate([index.records for index in indices])
        counts = [len(index.records) for index in indices]
        self._shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._stamps = [index.stamp for index in indices]
        self._descriptors = _Descriptors()
        if len(self._records) == 0:
            raise UsageError(
                f"{self.name} holds no images ({len(self._shards)} shards; images end in "
                f"{' '.join(sorted(IMAGE_EXTENSIONS))}); set data.path to WebDataset shards of images"
            )
        self.classes = self._label()
        self.labels: Tensor = torch.from_numpy(self._records["label"].astype(np.int64))

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> bytes:
        """The bytes of an image's member, compared with their CRC-32 where the header states it."""
        record = self._records[index]
        size = int(record["size"])
        try:
            file = self._open(index)  # held until the end, or it might be closed, and its number be another file's
            data = read_all(file.number, int(record["start"]), size)
        except OSError as error:
            raise RunError(f"{self.describe(index)} cannot be read ({error.strerror}); {REMEDY}") from None
        if len(data) != size:
            raise RunError(f"{self.describe(index)}: the shard was cut short while it was in use; replace it")
        if record["checked"] and zlib.crc32(data) != record["crc32"]:
            raise RunError(f"{self.describe(index)} fails its checksum; {REMEDY}")
        return data

    def describe(self, index: int) -> str:
        """SHARD:MEMBER (SHARD:byte N where the shard cannot be read any more)."""
        shard, position = self._shards[int(self._shard_of[index])], int(self._records["header"][index])
        try:
            file = self._open(index)
            member = next(members(Window(file.number, stamp_of(file.number)["bytes"]), position))
        except (OSError, RunError, Damaged, StopIteration):
            return f"{shard}:byte {position}"
        return f"{shard}:{text(member.name)}"

    def _open(self, index: int) -> _Descriptor:
        shard = int(self._shard_of[index])
        return self._descriptors.take(self._shards[shard], self._stamps[shard])

    def _read_indices(self) -> list[ShardIndex]:
        """The index of every shard; told or noted what is wrong with it."""
        with ThreadPoolExecutor(INDEX_THREADS, thread_name_prefix="vadit-index") as pool:
            indices = list(pool.map(shard_index, self._shards))
        for path, index in zip(self._shards, indices, strict=True):
            for member, why in index.bad.items():
                self._note(f"{path}:{member}", why)
        return indices

    def _note(self, place: str, why: str) -> None:
        if self._on_error == "raise":
            raise RunError(f"{place}: {why}; {REMEDY}")
        self.bad_files[place] = why

    def _label(self) -> list[str]:
        """Names of the classes; images without a label are dealt with here."""
        unlabelled = self._records["label"] == NO_LABEL
        if unlabelled.all():
            self._records = self._records.copy()
            self._records["label"] = 0
            return ["all"]
        for index in np.flatnonzero(unlabelled):
            self._note(self.describe(int(index)), 'there is no label, neither .cls nor .json with "label" or "cls"')
        self._records, self._shard_of = self._records[~unlabelled], self._shard_of[~unlabelled]
        highest = int(self._records["label"].max())
        names = _class_names(self._shards[0].parent)
        if names is None:
            return [str(label) for label in range(highest + 1)]
        if highest >= len(names):
            raise UsageError(
                f"{self._shards[0].parent} names {len(names)} classes, but {self.name} holds the label {highest}; "
                "add the names that are missing to classes.json or classes.txt, or remove that file"
            )
        return names

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptors = _Descriptors()


class TarShardWriter:
    """Writes one shard; it is whole or not there, and its bytes depend on what is added alone.

        with TarShardWriter(folder / shard_name("images", 0), {"source": ...}) as writer:
            writer.add("00000000", "jpg", data, label=3)

    The last member (NOTE_MEMBER, which readers pass over) holds the number of images and the `note` (JSON values).
    RunError: the shard cannot be written.
    """

    def __init__(self, path: str | Path, note: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.note = dict(note or {})
        """May be changed until the shard is closed."""
        self._keys: set[str] = set()

    @property
    def num_images(self) -> int:
        """Images so far."""
        return len(self._keys)

    def add(self, key: str, extension: str, data: bytes, label: int) -> None:
        """Add a sample: the members KEY.EXTENSION and KEY.cls."""
        base = key.rpartition("/")[2]
        if not base or "." in base:
            raise ValueError(f"the key {key!r} has a dot or no name; a sample's name ends at the first dot")
        if extension not in IMAGE_EXTENSIONS or not 0 <= label < MAX_CLASSES or key in self._keys:
            raise ValueError(f"{key}.{extension} with label {label} is no image of a class, or is there already")
        self._keys.add(key)
        self._member(f"{key}.{extension}", data, (f"label={label}", f"crc32={zlib.crc32(data):08x}"))
        self._member(f"{key}.cls", str(label).encode())

    def __enter__(self) -> TarShardWriter:
        with self._told():
            self._whole = whole_file(self.path)
            self._file: BinaryIO = open(self._whole.__enter__(), "wb")  # closed by __exit__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                self._abandon(failure)
                raise
            with self._told():
                self._whole.__exit__(None, None, None)
            shard_index(self.path)
        else:
            self._abandon(error)

    def _finish(self) -> None:
        content = {"format": NOTE_FORMAT, "images": self.num_images, **self.note}
        self._member(NOTE_MEMBER, json.dumps(content).encode())
        with self._told():
            self._file.write(bytes(2 * BLOCK))
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _abandon(self, error: BaseException) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()
        self._whole.__exit__(type(error), error, error.__traceback__)

    def _member(self, name: str, data: bytes, owner: tuple[str, str] = ("", "")) -> None:
        entry = tarfile.TarInfo(name)  # mode 0644, no ids, no time: the bytes are the same everywhere
        entry.size = len(data)
        entry.uname, entry.gname = owner
        with self._told():
            self._file.write(entry.tobuf(tarfile.PAX_FORMAT))
            self._file.write(data)
            self._file.write(bytes(-len(data) % BLOCK))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({write_fault(error)}); make room or give permission, then start "
                "again: it goes on where it was"
            ) from error


def shard_name(name: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{number:06d}.tar"


def find_shards(name: str) -> list[Path]:
    """The shards of a folder, a file or a pattern, in order; UsageError where there are none."""
    path = Path(name)
    try:
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.suffix == ".tar" and entry.name[0] != ".")
            if not found:
                raise UsageError(f"{name} holds no .tar files; set data.path to a folder of WebDataset shards")
            _check_complete(path, [entry.name for entry in found])
            return found
    except OSError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror}); give read permission or set another") from None
    if path.exists() or "{" not in name:
        shards = [path]
    else:
        shards = [Path(each) for each in expand(name)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        some = f" ({len(missing)} of the {len(shards)} shards that {name} names are missing)" if len(shards) > 1 else ""
        raise UsageError(f"{missing[0]} does not exist{some}; set data.path to .tar files that are there")
    return shards


def _check_complete(folder: Path, found: list[str]) -> None:
    """Refuse a folder of `vadit prepare` that lacks shards."""
    path = folder / PREPARED_FILE
    if not path.is_file():
        return
    try:
        shards = json.loads(path.read_text())["shards"]
        missing = [] if shards is None else sorted(set(shards) - set(found))
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is damaged; run the `vadit prepare` command again, or remove that file") from None
    if shards is None:
        raise UsageError(f"{folder} is not finished: run its `vadit prepare` command again to complete it")
    if missing:
        raise RunError(f"{folder / missing[0]} is missing; run the `vadit prepare` command again to make it anew")


def expand(pattern: str) -> list[str]:
    """What a pattern with {000..099} and {a,b} stands for, in the shell's order."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is not None:
        middles = words.split(",")
    else:
        if abs(int(last) - int(first)) >= MAX_SHARDS:
            raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} shards; set a smaller range")
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        middles = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    ends = expand(pattern[found.end() :])
    if len(middles) * len(ends) > MAX_SHARDS:
        raise UsageError(f"{pattern} stands for more than {MAX_SHARDS} shards; set a smaller range")
    return [pattern[: found.start()] + middle + end for middle in middles for end in ends]


def _class_names(folder: Path) -> list[str] | None:
    """The names in classes.json or classes.txt of the folder, where there is one."""
    for path in (folder / CLASSES_FILE, folder / "classes.txt"):
        try:
            content = path.read_text(encoding="utf-8")
            names = json.loads(content) if path.suffix == ".json" else content.splitlines()
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read ({error}); remove or replace it") from None
        if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            raise UsageError(f"{path} must hold a list of names, the class of label 0 first; remove or replace it")
        return names
    return None


class _Descriptor:
    """An open file, closed when nobody uses it any more: not while a thread reads from it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Descriptors:
    """The files that were read from last."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, path: Path, stamp: dict[str, int]) -> _Descriptor:
        """The open file; RunError where it is not the one that was indexed, OSError where it cannot be opened."""
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = _Descriptor(path)
                if stamp_of(file.number) != stamp:
                    raise RunError(f"{path} was changed while it was in use; start again")
                self._open[path] = file
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return file
