"""Single rows of latent shards, gathered into batches."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vadit.latents.shards import LatentShard, is_finite
from vadit.runtime.reading import OpenFiles


class RowReader:
    """Rows of a tensor that lies in parts in the shards of a folder, plain or mirrored; from any thread."""

    def __init__(self, shards: Sequence[LatentShard], key: str) -> None:
        entries = [(shard.tensors[key], shard.tensors.get(f"{key}_flip", shard.tensors[key])) for shard in shards]
        first = entries[0][0]
        self.shape, self.dtype = first.shape[1:], first.dtype
        self._key, self._shards = key, shards
        self._row_bytes = first.row_bytes
        self._offsets = np.array([[entry.offset for entry in pair] for pair in entries], np.int64)
        self._ends = np.cumsum([shard.count for shard in shards])
        self._starts = self._ends - [shard.count for shard in shards]
        self._files = OpenFiles([shard.path for shard in shards])

    def read(self, ids: Tensor, flips: Tensor, *, pin: bool = False) -> Tensor:
        """Stored rows (B, *shape) of the latents `ids`, mirrored where `flips`; RunError names one that is damaged."""
        numbers = np.searchsorted(self._ends, ids.numpy(), side="right")
        places = ids.numpy() - self._starts[numbers]
        offsets = self._offsets[numbers, flips.numpy().astype(np.intp)] + places * self._row_bytes
        stored = torch.empty((len(ids), *self.shape), dtype=self.dtype, pin_memory=pin)
        rows = stored.view(torch.uint8).numpy().reshape(len(ids), self._row_bytes)
        for row, number, offset in zip(rows, numbers.tolist(), offsets.tolist(), strict=True):
            try:
                file = self._files.opened(number)  # the name keeps it open
                if os.preadv(file.descriptor, [row.data], offset) == self._row_bytes:
                    continue
            except OSError:
                pass  # and once more, with patience
            try:
                data = self._files.read(number, offset, self._row_bytes)
            except OSError as error:
                raise self._shards[number].damage(f"it cannot be read: {error.strerror or error}") from None
            if len(data) != self._row_bytes:
                raise self._shards[number].damage("it is cut short")
            row[:] = np.frombuffer(data, np.uint8)
        if not is_finite(stored):
            wrong = next(place for place, row in enumerate(stored) if not is_finite(row))
            name = f"{self._key}_flip" if flips[wrong] else self._key
            raise self._shards[int(numbers[wrong])].damage(
                f"row {places[wrong]} of {name} (latent {ids[wrong]}) holds values that are not finite"
            )
        return stored
