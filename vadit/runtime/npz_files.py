"""Arrays of .npz files of any origin: the headers first, their sizes against the file and a limit, then the numbers."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.reading import patiently

MAX_BYTES = 256 << 20  # of an array that is read whole, unless its reader says otherwise
MAX_HEADER = 1 << 16  # bytes that describe one
_RATIOS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
"""Bytes that one byte in the file becomes at most, by the kinds of compression that numpy writes."""


@dataclass(frozen=True)
class Entry:
    """An array as the header of its member describes it."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Npz:
    """An .npz of which only the headers have been read, and found to fit the sizes of their members.

    RunError, here and where numbers are read: the file is none, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        with self._opened() as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as stream:
                        self.entries[name.removesuffix(".npy")] = _header(stream, archive.getinfo(name))

    def array(
        self, name: str, shape: Sequence[int | None], kinds: str = "fiu", max_bytes: int = MAX_BYTES
    ) -> np.ndarray:
        """An array whole; UsageError where it is missing, not finite, or not of these kinds (letters) or shape."""
        entry = self.entries.get(name)
        if (
            entry is None
            or entry.dtype.kind not in kinds
            or len(entry.shape) != len(shape)
            or any(side not in (None, found) for side, found in zip(shape, entry.shape, strict=True))
        ):
            needed = f"numbers ({kinds}) of shape ({', '.join('any' if side is None else str(side) for side in shape)})"
            raise UsageError(f"{self.path}: {name} is {entry or 'missing'}; needed: {needed}")
        if entry.num_bytes > max_bytes:
            raise UsageError(f"{self.path}: {name} has {entry.num_bytes:,} bytes; at most {max_bytes:,} are read")
        with self.stream(name) as stream:
            data = bytearray(stream.read(entry.num_bytes))
            if len(data) != entry.num_bytes:
                raise EOFError(f"{name} ends early")
        array = np.frombuffer(data, entry.dtype).reshape(entry.shape, order="F" if entry.fortran else "C")
        if entry.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"{self.path}: {name} holds NaN or infinity; make the file anew")
        return array

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """The bytes of an array, to be read in parts; the caller has looked at its entry."""
        with self._opened() as archive, archive.open(f"{name}.npy") as stream:
            _header(stream, archive.getinfo(f"{name}.npy"))
            yield stream

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        try:
            with patiently(lambda: zipfile.ZipFile(self.path), self.path) as archive:
                yield archive
        except (UsageError, RunError):
            raise
        except Exception as error:  # zip, zlib and numpy, which evaluates a header, each fail in their own ways
            raise RunError(f"{self.path} cannot be read as .npz ({first_line(error)}); write it again") from None


def read_array_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type, of an array in numpy's format; `stream` can be peeked into."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if (length := int.from_bytes(stream.peek(4)[:4], "little")) > MAX_HEADER:  # numpy reads it, then looks how long
        raise ValueError(f"a header of {length:,} bytes")
    return np.lib.format.read_array_header_2_0(stream)


def _header(stream: IO[bytes], member: zipfile.ZipInfo) -> Entry:
    shape, fortran, dtype = read_array_header(stream)
    entry = Entry(shape, fortran, dtype, math.prod(shape) * dtype.itemsize)
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename} holds {entry}")
    if stream.tell() + entry.num_bytes != member.file_size:
        raise ValueError(f"{member.filename} is truncated, or no {entry}")
    if member.file_size > member.compress_size * _RATIOS.get(member.compress_type, 0):
        raise ValueError(f"{member.filename} cannot have {member.file_size:,} bytes")
    return entry
