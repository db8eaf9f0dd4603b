"""Latents without files: made up on the fly, for tests and benchmarks of all else."""

from __future__ import annotations

import torch
from torch import Tensor

from vadit.config import DiTSpec
from vadit.latents.companions import Companion
from vadit.runtime import rng
from vadit.runtime.errors import RunError


class DebugLatents:
    """`num_images` random latents that fit a model, made on the fly from their index."""

    def __init__(self, num_images: int, model: DiTSpec) -> None:
        self.channels = model.in_channels
        self.size = model.input_size
        self.num_classes = model.num_classes
        self.mean = torch.zeros(1, self.channels, 1, 1)
        self.std = torch.ones(1, self.channels, 1, 1)
        self.num_left_out = 0
        self.companion: Companion | None = None
        self.labels = rng.integers(rng.fold(0, "debug labels"), torch.arange(num_images), model.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, epoch: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """Latents (B, d, h, w) float32 and labels (B,) int64, and companions; the same in every epoch."""
        shape = (self.channels, self.size, self.size)
        parts = (rng.normal(rng.fold(0, "debug latents"), ids, shape).to(device), self.labels[ids].to(device))
        if self.companion is None:
            return parts
        return (*parts, self.companion.batch(ids, [False] * len(ids), device)[0])

    def note_bad(self, bad: dict[int, RunError]) -> None:
        """There are none."""

    def warn_of_bad(self) -> None:
        """There are none."""

    def denormalize(self, latents: Tensor) -> Tensor:
        """The latents themselves: these are not normalised."""
        return latents
