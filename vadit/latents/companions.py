"""What comes with a latent for REPA: a foundation model's features of its image, or the image itself.

A companion is of the same image as its latent and mirrored where the latent is, so that token and feature show the same
part of the picture.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vadit.config import LatentDataSpec, RepaSpec
from vadit.latents.rows import RowReader
from vadit.latents.shards import LatentShard
from vadit.runtime import rng
from vadit.runtime.errors import UsageError

DEBUG_WIDTH = 16  # channels of made-up features


class Companion(Protocol):
    """A third part of each sample."""

    shape: tuple[int, ...]  # of one: (D, h, w) of features, bfloat16, or (3, H, W) of an image, uint8

    def batch(self, ids: Tensor, flips: Tensor, device: str | torch.device) -> Tensor:
        """Those of the latents `ids`, (B, *shape); RunError names one that cannot be used. From any thread."""


class CachedFeatures:
    """Features that `vadit encode --features` wrote beside the latents, bfloat16."""

    def __init__(self, shards: Sequence[LatentShard]) -> None:
        self._rows = RowReader(shards, "features")
        self.shape = self._rows.shape

    def batch(self, ids: Tensor, flips: Tensor, device: str | torch.device) -> Tensor:
        pin = torch.device(device).type == "cuda"
        return self._rows.read(ids, flips, pin=pin).to(device, non_blocking=pin)


class DebugFeatures:
    """Made-up features of debug latents, a function of their index."""

    def __init__(self, grid: int) -> None:
        self.shape: tuple[int, ...] = (DEBUG_WIDTH, grid, grid)

    def batch(self, ids: Tensor, flips: Tensor, device: str | torch.device) -> Tensor:
        return rng.normal(rng.fold(0, "debug features"), ids, self.shape).bfloat16().to(device)


def open_features(spec: LatentDataSpec, repa: RepaSpec, shards: Sequence[LatentShard], grid: int) -> CachedFeatures:
    """The features beside the latents; UsageError where there are none, or those of another model, input or grid.

    grid: tokens of the generator along a side.
    """
    wanted, encode = repa.foundation, f"`vadit encode --features {repa.foundation.name}`"
    if "features" not in shards[0].tensors:
        raise UsageError(
            f"data.path {spec.path} holds no foundation features; make them with {encode}, or set "
            "--repa.features online and --data.images"
        )
    features = CachedFeatures(shards)
    if features.shape[1:] != (grid, grid):
        raise UsageError(
            f"data.path {spec.path} holds features of {features.shape[1]}x{features.shape[2]} but the generator has "
            f"{grid}x{grid} tokens; encode with --features-grid {grid}"
        )
    settings = shards[0].settings
    about = settings.features if settings is not None and settings.features else {}
    if about and wanted.name not in (about.get("name"), about.get("timm")):
        raise UsageError(
            f"data.path {spec.path} holds features of {about.get('name')} but repa.foundation.name is {wanted.name}; "
            f"set --repa.foundation.name {about.get('name')}, or encode with {encode}"
        )
    if about and about.get("input_range") != wanted.input_range:
        made = about.get("input_range")
        raise UsageError(
            f"data.path {spec.path} holds features made with input_range {made} but repa.foundation.input_range is "
            f"{wanted.input_range}; set --repa.foundation.input-range {made}, or encode anew"
        )
    return features
