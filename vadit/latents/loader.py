"""Latents in the order of training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vadit.latents.dataset import DebugLatents, LatentDataset
from vadit.runtime.stream import PositionedLoader, sample_ids

LOADER_THREADS = 2
"""Batches made at the same time; the work is copies and arithmetic outside the interpreter's lock."""


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

    @contextlib.contextmanager
    def _session(self) -> Iterator[Callable[[Tensor], Callable[[], tuple[Tensor, ...]]]]:
        companion = self.dataset.companion
        with contextlib.nullcontext() if companion is None else companion.session(self.device):
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
