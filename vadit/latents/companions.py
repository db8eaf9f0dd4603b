"""What comes with a latent for REPA: a foundation model's features of its image, or the image itself.

A companion is of the same image as its latent and mirrored where the latent is, so that token and feature show the same
part of the picture. One that is damaged counts as the latent's damage: it is skipped or named by the same rule.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vadit.config import ImageDataSpec, LatentDataSpec, RepaSpec
from vadit.images.loader import ImageDecoder, ImageSet, Request
from vadit.images.pillow import pillow_decoder
from vadit.latents import rows as latent_rows
from vadit.latents.rows import RowReader
from vadit.latents.shards import LatentShard, read_ids
from vadit.runtime import rng
from vadit.runtime.errors import UsageError

DEBUG_WIDTH = 16
"""Channels of made-up features."""
PIXELS_PER_TOKEN = 16
"""Side of an image over that of its grid of tokens, where nothing tells it: that of DiT/2 on f8, and of f16."""


class Companion(Protocol):
    """A third part of each sample."""

    shape: tuple[int, int, int]
    """Of one: (D, h, w) of features, (3, H, W) of an image."""
    has_features: bool
    """Features, bfloat16; else images, uint8."""

    def batch(self, ids: Tensor, flips: Sequence[bool], device: str | torch.device) -> tuple[Tensor, dict[int, str]]:
        """Those of the latents `ids`, (B, *shape), and place -> why one cannot be used. From any thread."""

    def session(self, device: str | torch.device) -> AbstractContextManager[None]:
        """While it lives, batches are made with threads."""


class CachedFeatures:
    """Features that `vadit encode --features` wrote beside the latents, bfloat16."""

    has_features = True

    def __init__(self, shards: Sequence[LatentShard]) -> None:
        found = [shard.features for shard in shards if shard.features is not None]
        assert len(found) == len(shards), "shards without features"
        self.shape = found[0].shape
        counts = [shard.count for shard in shards]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._row_bytes = found[0].plain.row_bytes
        self._bases = np.array([[rows.start for rows in (one.plain, one.flipped or one.plain)] for one in found])
        self._reader = RowReader(
            [shard.path for shard in shards], [shard.num_bytes for shard in shards], self._row_bytes
        )

    def batch(self, ids: Tensor, flips: Sequence[bool], device: str | torch.device) -> tuple[Tensor, dict[int, str]]:
        """See Companion."""
        indices = ids.numpy()
        which = np.searchsorted(self._ends, indices, side="right")
        offsets = self._bases[which, np.asarray(flips, np.intp)] + (indices - self._starts[which]) * self._row_bytes
        pin = torch.device(device).type == "cuda"
        features = torch.empty((len(ids), *self.shape), dtype=torch.bfloat16, pin_memory=pin)
        bits = features.view(torch.int16).numpy().view(np.uint16)
        numbers, places = which.tolist(), offsets.tolist()
        self._reader.expect(numbers, places)
        faults = {
            place: f"its features: {why}"
            for place, why in self._reader.read(numbers, places, latent_rows.bytes_of(bits)).items()
        }
        for place, row in enumerate(bits):
            if place not in faults and not latent_rows.is_finite(row):
                faults[place] = "its features hold values that are not finite"
        return features.to(device, non_blocking=pin), faults

    @contextlib.contextmanager
    def session(self, device: str | torch.device) -> Iterator[None]:
        """See Companion; the loader's own threads do."""
        yield


class OnlineImages:
    """The images that the latents were encoded from, uint8, cropped as for encoding."""

    has_features = False

    def __init__(self, images: ImageSet, image_ids: Tensor) -> None:
        """`image_ids`: index of the image of each latent, int64 (N,)."""
        self.shape = (3, images.size, images.size)
        self._images = images
        self._image_ids = image_ids
        self._decoder: ImageDecoder | None = None

    def batch(self, ids: Tensor, flips: Sequence[bool], device: str | torch.device) -> tuple[Tensor, dict[int, str]]:
        """See Companion."""
        if self._decoder is None:
            with self.session(device):
                return self.batch(ids, flips, device)
        indices = self._image_ids[ids].tolist()
        requests = [Request(index, mirror=mirror) for index, mirror in zip(indices, flips, strict=True)]
        decoded = self._decoder.submit(requests)()
        pixels = decoded.pixels.to(device, non_blocking=decoded.pixels.is_pinned())
        return pixels.permute(0, 3, 1, 2), {place: str(error) for place, error in decoded.failures.items()}

    @contextlib.contextmanager
    def session(self, device: str | torch.device) -> Iterator[None]:
        """See Companion."""
        with pillow_decoder(self._images, ImageDataSpec.num_workers, device)() as decoder:
            before, self._decoder = self._decoder, decoder
            try:
                yield
            finally:
                self._decoder = before


class DebugFeatures:
    """Made-up features of debug latents, a function of their index."""

    has_features = True

    def __init__(self, grid: int) -> None:
        self.shape = (DEBUG_WIDTH, grid, grid)

    def batch(self, ids: Tensor, flips: Sequence[bool], device: str | torch.device) -> tuple[Tensor, dict[int, str]]:
        """See Companion."""
        return rng.normal(rng.fold(0, "debug features"), ids, self.shape).bfloat16().to(device), {}

    @contextlib.contextmanager
    def session(self, device: str | torch.device) -> Iterator[None]:
        """See Companion."""
        yield


# ------------------------------------------------------------------------------------------------ which one


def open_companion(spec: LatentDataSpec, repa: RepaSpec, shards: Sequence[LatentShard], grid: int) -> Companion:
    """The companion that the settings ask for; `grid`: tokens of the generator along a side.

    UsageError: features that are missing, of another model or grid; images that are not those of the latents.
    """
    if repa.features == "cached":
        _check_features(spec, repa, shards, grid)
        return CachedFeatures(shards)
    settings = shards[0].settings
    images = _open_images(spec, spec.images, settings.size if settings is not None else PIXELS_PER_TOKEN * grid)
    return OnlineImages(images, _image_ids(spec, shards, images))


def open_debug_companion(spec: LatentDataSpec, repa: RepaSpec, num_images: int, grid: int) -> Companion:
    """The same for debug latents; images are debug images, too, where data.images names none."""
    if repa.features == "cached":
        return DebugFeatures(grid)
    images = _open_images(spec, spec.images or f"debug:{num_images}", PIXELS_PER_TOKEN * grid)
    return OnlineImages(images, torch.arange(num_images) % len(images))


def _open_images(spec: LatentDataSpec, path: str, size: int) -> ImageSet:
    from vadit.images.backends import open_images

    if not path:
        raise UsageError(
            "repa.features is online but data.images is empty; set --data.images to the images that the latents were "
            "encoded from, or --repa.features cached"
        )
    return open_images(ImageDataSpec(path=path, on_error=spec.on_error, max_bad_share=spec.max_bad_share), size)


def _check_features(spec: LatentDataSpec, repa: RepaSpec, shards: Sequence[LatentShard], grid: int) -> None:
    wanted, encode = repa.foundation, f"`vadit encode --features {repa.foundation.name}`"
    found = shards[0].features
    if found is None:
        raise UsageError(
            f"data.path {spec.path} holds no foundation features; make them with {encode}, or set "
            "--repa.features online and --data.images"
        )
    if found.shape[1:] != (grid, grid):
        raise UsageError(
            f"data.path {spec.path} holds features of {found.shape[1]}x{found.shape[2]} but the generator has "
            f"{grid}x{grid} tokens; encode with --features-grid {grid}"
        )
    settings = shards[0].settings
    told = json.loads(settings.features) if settings is not None and settings.features else {}
    if told and wanted.name not in (told.get("name"), told.get("timm")):
        raise UsageError(
            f"data.path {spec.path} holds features of {told.get('name')} but repa.foundation.name is {wanted.name}; "
            f"set --repa.foundation.name {told.get('name')}, or encode with {encode}"
        )
    if told and told.get("input_range") != wanted.input_range:
        made = told.get("input_range")
        raise UsageError(
            f"data.path {spec.path} holds features made with input_range {made} but repa.foundation.input_range is "
            f"{wanted.input_range}; set --repa.foundation.input-range {made}, or encode anew"
        )


def _image_ids(spec: LatentDataSpec, shards: Sequence[LatentShard], images: ImageSet) -> Tensor:
    """Index of each latent's image; UsageError where number or classes show that these are other images."""
    parts = [read_ids(shard.path) for shard in shards]
    known = [part for part in parts if part is not None]
    count = sum(shard.count for shard in shards)
    ids = torch.cat(known) if len(known) == len(parts) else torch.arange(count)
    settings = shards[0].settings
    expected = settings.num_images if settings is not None else count
    remedy = "set data.images to the images that the latents were encoded from, in the same order"
    if len(images) != expected or int(ids.max()) >= len(images):
        raise UsageError(
            f"data.images {spec.images} holds {len(images)} images but the latents of {spec.path} are of {expected}; "
            f"{remedy}"
        )
    labels = torch.cat([shard.labels for shard in shards])
    other = (images.labels[ids] != labels).nonzero().flatten()
    if len(images.classes) > 1 and len(other):  # a flat folder has no classes to compare
        index = int(other[0])
        image = int(ids[index])
        raise UsageError(
            f"{images.source.describe(image)} is of class {int(images.labels[image])} but its latent {index} in "
            f"{spec.path} is of class {int(labels[index])}; {remedy}"
        )
    return ids
