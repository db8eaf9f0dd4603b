"""Latents in the order of training."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vadit.latents.dataset import DebugLatents, LatentDataset
from vadit.runtime.stream import PositionedLoader, sample_ids

LOADER_THREADS = 2  # batches made at the same time; the work is copies and arithmetic outside the interpreter's lock


def label_ranges(labels: Tensor) -> list[tuple[int, int]]:
    """The labels that occur, as few ranges (first, last) as cover them: [(0, 2)] for 0, 1 and 2."""
    runs = itertools.groupby(enumerate(torch.unique(labels).tolist()), lambda pair: pair[1] - pair[0])
    found = [[label for _, label in run] for _, run in runs]
    return [(run[0], run[-1]) for run in found]


class LatentLoader(PositionedLoader[tuple[Tensor, ...]]):
    """Shuffled (latents (B, d, h, w) float32 normalised, labels (B,) int64); see PositionedLoader for the order.

    With a companion, batches have a third part: features (B, D, h, w) bfloat16 or images (B, 3, H, W) uint8.
    `device`: where batches are wanted; a GPU normalises them itself.
    """

    def __init__(
        self,
        dataset: LatentDataset | DebugLatents,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(len(dataset), batch_size, seed, rank, world_size)
        self.dataset = dataset
        self.device = device
        self.classes = label_ranges(dataset.labels)

    def state_dict(self) -> dict[str, Any]:
        """The position, and which classes there are samples of (ranges (first, last))."""
        return super().state_dict() | {"classes": self.classes}

    @contextlib.contextmanager
    def _session(self) -> Iterator[Callable[[Tensor], Callable[[], tuple[Tensor, ...]]]]:
        pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="vadit-data")
        try:
            yield lambda positions: pool.submit(self._load, positions, self.seed).result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, positions: Tensor, seed: int) -> tuple[Tensor, ...]:
        parts = [
            self.dataset.batch(ids, epoch, seed, self.device)
            for epoch, ids in sample_ids(positions, self.num_samples, seed)
        ]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
