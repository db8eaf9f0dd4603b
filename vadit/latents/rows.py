"""Rows of latent shards into batches: memory maps, widening to float32, and the memory that this takes.

Work goes block by block, a block being small enough for a core's cache.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vadit.latents.noise import NoiseScratch

BLOCK_BYTES = 1 << 20
"""Float32 bytes that are worked on at a time."""
MAX_MAPS = 512
"""Files that are mapped at a time: each takes a descriptor, of which a process often has 1024."""
MAX_MAPPED_BYTES = 4 << 30
"""Once so much was read, maps let go of their pages: they stay in the system's cache, but count for nobody."""
COLD_ROW_S = 50e-6
"""Rows that take longer come from the disk: then the kernel is told of a whole batch's rows before the first is read,
so that it fetches them side by side."""
KEPT_BUFFERS = 8
MAX_KEPT_BYTES = 256 << 20

_BITS: dict[type, tuple[type, type, int]] = {
    np.uint16: (np.int16, np.uint16, 0x7F80),  # bfloat16
    np.float16: (np.int16, np.uint16, 0x7C00),
    np.float32: (np.int32, np.uint32, 0x7F800000),
}
"""Signed and unsigned integers of that size, and the bits of infinity."""


class RowReader:
    """Reads rows of `row_bytes` from some files, from any thread. Files are mapped when their first row is read.

    `sizes`: what each file must hold, in bytes.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], row_bytes: int) -> None:
        self._paths, self._sizes, self._row_bytes = list(paths), list(sizes), row_bytes
        self._views: list[np.ndarray | None] = [None] * len(self._paths)
        self._maps: deque[tuple[int, mmap.mmap]] = deque()
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._cold = False

    def read(self, numbers: Sequence[int], offsets: Sequence[int], target: np.ndarray) -> dict[int, str]:
        """Row i of `target`, uint8 (B, row_bytes), from byte offsets[i] of file numbers[i].

        Returns place -> why a row could not be read.
        """
        size, views = self._row_bytes, self._views
        faults: dict[int, str] = {}
        for place, (number, offset) in enumerate(zip(numbers, offsets, strict=True)):
            view = views[number]
            if view is None:
                try:
                    view = self._map(number)
                except OSError as error:
                    faults[place] = f"it cannot be read: {error.strerror or error}"
                    continue
            target[place] = view[offset : offset + size]
        return faults

    def expect(self, numbers: Sequence[int], offsets: Sequence[int]) -> None:
        """Tell the kernel which rows come next, where they seem to come from the disk; keep the maps small."""
        with self._lock:
            self._bytes_read += len(numbers) * self._row_bytes
            if self._bytes_read > MAX_MAPPED_BYTES:
                self._bytes_read = 0
                for _, memory in self._maps:
                    memory.madvise(mmap.MADV_DONTNEED)
            if self._cold:
                maps = dict(self._maps)
                for number, offset in zip(numbers, offsets, strict=True):
                    if number in maps:
                        start = offset - offset % mmap.PAGESIZE
                        maps[number].madvise(mmap.MADV_WILLNEED, start, offset + self._row_bytes - start)

    def note_time(self, num_rows: int, started: float) -> None:
        """Remember whether the rows read since `started` (time.perf_counter) were slow to come."""
        self._cold = time.perf_counter() - started > num_rows * COLD_ROW_S

    def _map(self, number: int) -> np.ndarray:
        with self._lock:
            if (view := self._views[number]) is not None:
                return view
            with self._paths[number].open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._sizes[number]:
                    raise OSError(0, "the file was cut short")
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            memory.madvise(mmap.MADV_RANDOM)  # no read-ahead: the next row is somewhere else
            view = np.frombuffer(memory, np.uint8)
            if len(self._maps) == MAX_MAPS:
                oldest, _ = self._maps.popleft()  # unmapped when the last thread has done with it
                self._views[oldest] = None
            self._maps.append((number, memory))
            self._views[number] = view
            return view


class Scratch:
    """What one thread needs to turn a block of stored rows (c, h, w) into float32."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, has_moments: bool) -> None:
        channels, height, width = shape
        size = math.prod(shape)
        self.rows = max(1, BLOCK_BYTES // (4 * max(size // (1 + has_moments), 1)))
        bits = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32}[dtype]
        self.stored = np.empty((self.rows, channels, height * width), bits)
        self.values = np.empty(self.stored.shape, np.float32)
        self.noise = NoiseScratch(self.rows, size // 2) if has_moments else None


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The memory of contiguous rows, uint8 (B, bytes of a row)."""
    return array.reshape(len(array), -1).view(np.uint8)


def widen(stored: np.ndarray, values: np.ndarray) -> None:
    """Stored numbers, bfloat16 as its bits in uint16, to float32 of the same shape."""
    if stored.dtype == np.uint16:
        bits = values.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(values, stored)


def is_finite(stored: np.ndarray) -> bool:
    """Whether stored numbers (bfloat16 as its bits) hold neither NaN nor infinity.

    Those have the largest bits: among the positive ones as signed integers, among the negative ones as unsigned.
    """
    signed, unsigned, infinity = _BITS[stored.dtype.type]
    flat = stored.reshape(-1)
    if not flat.size:
        return True
    return bool(
        np.maximum.reduce(flat.view(signed)) < infinity
        and np.maximum.reduce(flat.view(unsigned)) < infinity + np.iinfo(signed).max + 1
    )


class Buffers:
    """Float32 arrays for batches. One that no tensor shares memory with any more is used again: fresh memory of the
    size of a batch costs more time (page faults) than the batch.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape, with any content. Its memory comes back here when the array is gone, with all
        tensors made of it by torch.from_numpy; arrays that are views of it do not count.
        """
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size, np.float32)
        if memory.size < size:
            memory = np.empty(size, np.float32)
        array = memory[:size].reshape(shape)
        if memory.nbytes <= MAX_KEPT_BYTES:
            weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < KEPT_BUFFERS:
            self._free.append(memory)
