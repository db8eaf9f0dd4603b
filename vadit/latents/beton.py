"""Latents in a .beton: each one a row of bytes (numba, with which FFCV reads, knows neither float16 nor bfloat16).

Fields: `latents` and, where the mirrored images are there, `latents_flip` (uint8 arrays of one dimension: the bytes of
(c, h, w) in the stored type), `label`, `id` (index of the image in its source) and `crc32`. Shape, type and what the
numbers mean stand in the file's notes. FFCV's Loader yields uint8 (B, bytes): `.view(torch.bfloat16)` and reshape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadit.images.beton import BetonFile
from vadit.images.beton_writer import BetonWriter, Field
from vadit.runtime.errors import UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LatentRows = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""(latents (B, c, h, w), those of the mirrored images or None, labels (B,), ids (B,))."""


def write_latents(
    path: str | Path,
    batches: Iterable[LatentRows],
    *,
    count: int,
    shape: tuple[int, int, int],
    dtype: str,
    has_moments: bool,
    flip: bool,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write latents as they come, whole or not at all. `shape` is the stored (c, h, w): 2d channels where moments.

    `count` bounds their number. `notes` (JSON values: settings, class names) come back from `BetonLatents.notes`.
    RunError: the disk is full.
    """
    kind = DTYPES[dtype]
    num_bytes = math.prod(shape) * kind.itemsize
    names = ("latents", "latents_flip") if flip else ("latents",)
    fields = (*(Field(name, "array", num_bytes) for name in names), Field("label", "int"), Field("id", "int"))
    writer = BetonWriter(path, fields, max_samples=count, resume=False)
    try:
        for latents, flipped, labels, ids in batches:
            parts = [latents] if flipped is None else [latents, flipped]
            if len(parts) != len(names) or any(part.shape[1:] != shape for part in parts):
                raise ValueError(f"{[tuple(part.shape) for part in parts]} for {names} of {shape}")
            rows = [_as_bytes(part, kind) for part in parts]
            for place, (label, index) in enumerate(zip(labels.tolist(), ids.tolist(), strict=True)):
                writer.append(*(part[place].tobytes() for part in rows), label, index)
        about = {"content": "latents", "shape": list(shape), "dtype": dtype, "has_moments": has_moments}
        writer.finish({**(notes or {}), **about})
    except BaseException:
        writer.discard()
        raise


def _as_bytes(latents: Tensor, kind: torch.dtype) -> np.ndarray:
    """(B, c, h, w) as uint8 (B, bytes)."""
    return latents.detach().cpu().to(kind).flatten(1).contiguous().view(torch.uint8).numpy()


class BetonLatents:
    """The latents of a .beton, memory-mapped: for a data set that treats the file as one shard.

    UsageError: the file holds something else. RunError: it is damaged.
    """

    shape: tuple[int, int, int]
    """(c, h, w) of a stored row, with 2d channels where `has_moments`."""
    dtype: torch.dtype
    has_moments: bool
    labels: Tensor
    """int64 (N,)."""
    ids: Tensor
    """int64 (N,)."""
    offsets: np.ndarray
    """int64 (N,): byte of the file where each row begins."""
    flip_offsets: np.ndarray | None
    """int64 (N,): the same for the mirrored images."""
    notes: dict[str, Any]
    """What the writer was given, and shape, dtype, has_moments."""

    def __init__(self, path: str | Path) -> None:
        self.file = BetonFile(path)
        self.notes = self.file.notes
        fields = {field.name: field for field in self.file.fields}
        kinds = {name: field.kind for name, field in fields.items()}
        needed = {"latents": "array", "label": "int", "id": "int"}
        if self.notes.get("content") != "latents" or any(kinds.get(name) != kind for name, kind in needed.items()):
            raise UsageError(
                f"{path} holds no latents of vadit's (its fields are {', '.join(fields)}); "
                "set data.path to a .beton of latents, or to a folder of shards"
            )
        shape, dtype = self.notes.get("shape"), self.notes.get("dtype")
        self.has_moments = self.notes.get("has_moments") is True
        self.num_bytes = fields["latents"].size
        if (
            not isinstance(shape, list)
            or len(shape) != 3
            or any(not isinstance(side, int) or side < 1 for side in shape)
            or dtype not in DTYPES
            or math.prod(shape) * DTYPES[dtype].itemsize != self.num_bytes
            or (self.has_moments and shape[0] % 2)
        ):
            raise self.file.fail(f"its latents are said to be {dtype} {shape} in {self.num_bytes} bytes")
        self.shape, self.dtype = (shape[0], shape[1], shape[2]), DTYPES[dtype]
        self.offsets = self.file.payloads("latents")[0].astype(np.int64)
        self.flip_offsets = None
        if kinds.get("latents_flip") == "array":
            if fields["latents_flip"].size != self.num_bytes:
                raise self.file.fail("its plain and mirrored latents have different sizes")
            self.flip_offsets = self.file.payloads("latents_flip")[0].astype(np.int64)
        labels = self.file.column("label")
        if labels.min() < 0:
            raise self.file.fail(f"it holds the label {labels.min()}")
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.ids = torch.from_numpy(self.file.column("id").astype(np.int64))
        self._map = self.file.map()

    def __len__(self) -> int:
        return len(self.file)

    def row(self, index: int, *, flipped: bool = False) -> np.ndarray:
        """A view of a row's bytes, uint8 (num_bytes,); its checksum is not compared (see `verify`)."""
        begin = int(self._offsets(flipped=flipped)[index])
        return self._map[begin : begin + self.num_bytes]

    def rows(self, *, flipped: bool = False) -> np.ndarray | None:
        """All rows as one read-only view, uint8 (N, num_bytes), or None where they do not lie evenly.

        They do where a page is a multiple of a sample, as with every shape of powers of two.
        """
        offsets = self._offsets(flipped=flipped)
        steps = np.diff(offsets)
        if len(steps) and (steps[0] < self.num_bytes or (steps != steps[0]).any()):
            return None
        step = int(steps[0]) if len(steps) else self.num_bytes
        return np.lib.stride_tricks.as_strided(
            self._map[int(offsets[0]) :], (len(offsets), self.num_bytes), (step, 1), writeable=False
        )

    def verify(self, index: int) -> None:
        """RunError where a sample (both rows, label, id) fails its checksum."""
        self.file.sample(index)

    def _offsets(self, *, flipped: bool) -> np.ndarray:
        if not flipped:
            return self.offsets
        if self.flip_offsets is None:
            raise ValueError(f"{self.file.path} holds no mirrored latents")
        return self.flip_offsets
