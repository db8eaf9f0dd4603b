"""Latents for the generator: the data set over its shards, and one that is made up.

Which of plain and mirrored latent is taken and the posterior's noise are functions of (seed, image id, epoch) alone,
where the image id is the latent's index in the folder.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vadit.config import DiTSpec, LatentDataSpec, PictureSpec, RepaSpec
from vadit.latents.companions import Companion, DebugFeatures, open_features
from vadit.latents.noise import posterior_noise
from vadit.latents.rows import RowReader
from vadit.latents.shards import INDEX_FILE, NAME_FOLDER, open_finished_folder
from vadit.latents.statistics import load_statistics
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.runtime.stream import debug_count

SHAPE = ("in_channels", "input_size", "num_classes")  # Settings of a model that follow its latents.
BLOCK = 64  # latents that are worked on at a time: few enough for a core's cache


class LatentDataset:
    """A folder of latents, from `vadit encode` or in the authors' layout (`latents`, `latents_flip`, `labels`).

    `mean` and `std`, (1, d, 1, 1), are what normalisation uses: 0 and 1 where `normalize` is off. A normalised latent
    is (z - mean) / std * multiplier, and `denormalize` is its inverse. In memory are the labels and the shards'
    headers: 8 bytes per latent, whatever its size.
    """

    def __init__(
        self,
        folder: str | Path,
        normalize: bool = LatentDataSpec.normalize,
        flip: bool = LatentDataSpec.flip,
        multiplier: float = LatentDataSpec.multiplier,
    ) -> None:
        if not str(folder):
            raise UsageError(f"data.path is empty; {NAME_FOLDER}")
        self.folder = Path(folder)
        self.flip = flip
        self.multiplier = multiplier
        self.companion: Companion | None = None  # third part of each batch, for REPA
        self.shards, self.num_classes = open_finished_folder(self.folder)
        first = self.shards[0]
        self.channels, self.size, width = first.shape
        if self.size != width:
            raise UsageError(f"{folder} holds latents of {self.size} x {width}; the generator needs squares")
        if flip and not all(shard.has_flipped for shard in self.shards):
            raise UsageError(f"{folder} holds no mirrored latents; set --data.no-flip, or encode anew with --flip")
        self.labels = torch.cat([shard.labels for shard in self.shards])
        self.image_size = None if first.settings is None else first.settings.size
        self.pictures: PictureSpec = first.settings or PictureSpec()
        self.mean, self.std = torch.zeros(1, self.channels, 1, 1), torch.ones(1, self.channels, 1, 1)
        if normalize:
            statistics = load_statistics(self.folder, self.channels)
            self.mean, self.std = statistics.mean, statistics.std
        self._normalize = normalize
        self._rows = RowReader(self.shards, first.key)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        """Mean and deviation on each device that was asked for: sending them anew would wait for the device."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, epoch: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """Latents (B, d, h, w) float32, normalised, and labels (B,) int64 of the samples `ids` in this epoch.

        With a companion, that of each latent, too: features (B, D, h, w) bfloat16 or images (B, 3, H, W) uint8.
        RunError names a shard that is damaged. To a CUDA device rows go as they are stored, through pinned memory and
        without a wait, and are normalised there; the noise is the CPU's.
        """
        flips = torch.zeros(len(ids), dtype=torch.bool)
        if self.flip:
            flips = rng.uniform(rng.fold(seed, "flip", epoch), ids) < 0.5
        latents = torch.empty((len(ids), self.channels, self.size, self.size), device=device)
        for start in range(0, len(ids), BLOCK):
            block = slice(start, start + BLOCK)
            self._fill(latents[block], ids[block], flips[block], rng.fold(seed, "posterior", epoch))
        parts = (latents, _send(self.labels[ids], device))
        return parts if self.companion is None else (*parts, self.companion.batch(ids, flips, device))

    def _fill(self, latents: Tensor, ids: Tensor, flips: Tensor, noise_seed: int) -> None:
        """Some rows of a batch: read, sampled, normalised."""
        device, pin = latents.device, latents.is_cuda
        stored = self._rows.read(ids, flips, pin=pin).to(device, non_blocking=pin)
        if self.shards[0].has_moments:
            mean, std = stored.float().chunk(2, dim=1)
            noise = posterior_noise(noise_seed, ids, math.prod(mean.shape[1:]))
            latents.copy_(_send(noise, device).reshape(mean.shape)).mul_(std).add_(mean)
        else:
            latents.copy_(stored)
        if self._normalize:
            if device not in self._on_device:
                self._on_device[device] = (self.mean.to(device), self.std.to(device))
            mean, std = self._on_device[device]
            latents.sub_(mean).div_(std)
        if self.multiplier != 1:
            latents.mul_(self.multiplier)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, d, h, w) as the autoencoder's decoder takes them."""
        mean, std = self.mean.to(latents), self.std.to(latents)
        return latents / self.multiplier * std + mean

    def image_ids(self) -> tuple[Tensor, int]:
        """Of each latent, the index of its image in the source, int64 (N,), and the number of images there."""
        parts = [shard.ids() for shard in self.shards]
        known = [part for part in parts if part is not None]
        ids = torch.cat(known) if len(known) == len(parts) else torch.arange(len(self))
        settings = self.shards[0].settings
        return ids, len(self) if settings is None else settings.num_images


def _send(tensor: Tensor, device: str | torch.device) -> Tensor:
    """To the device; to a GPU out of pinned memory, without waiting for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class DebugLatents:
    """`num_images` random latents that fit a model, made on the fly from their index: for tests of all else."""

    def __init__(self, num_images: int, model: DiTSpec) -> None:
        self.channels = model.in_channels
        self.size = model.input_size
        self.num_classes = model.num_classes
        self.image_size: int | None = None
        self.pictures = PictureSpec()
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
        return (*parts, self.companion.batch(ids, torch.zeros(len(ids), dtype=torch.bool), device))

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents

    def image_ids(self) -> tuple[Tensor, int]:
        return torch.arange(len(self)), len(self)


def shape_of(path: str, num_classes: int) -> dict[str, int]:
    """What latents ask of a model, by SHAPE; of `num_classes` where no index says more than labels do."""
    shards, found = open_finished_folder(Path(path))
    channels, size, _ = shards[0].shape
    if not (Path(path) / INDEX_FILE).exists():
        found = max(found, num_classes)
    return {"in_channels": channels, "input_size": size, "num_classes": found}


def differences(found: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """In words, where what is `wanted` of a model contradicts what its latents are: more classes do not."""
    wrong = [
        f"model.{name} is {wanted[name]} where the latents have {found[name]}"
        for name in SHAPE
        if name in wanted and (wanted[name] < found[name] or (wanted[name] > found[name] and name != "num_classes"))
    ]
    return ", ".join(wrong)


def open_latents(spec: LatentDataSpec, model: DiTSpec, repa: RepaSpec | None = None) -> LatentDataset | DebugLatents:
    """The latents that the settings name, checked to fit the model.

    Where `repa` has a weight and cached features, those are their companion; images are for the caller to add.
    """
    cached = repa if repa is not None and repa.weight > 0 and repa.features == "cached" else None
    grid = model.input_size // model.patch_size
    if spec.path.startswith("debug:"):
        made_up = DebugLatents(debug_count(spec.path), model)
        if cached is not None:
            made_up.companion = DebugFeatures(grid)
        return made_up
    dataset = LatentDataset(spec.path, spec.normalize, spec.flip, spec.multiplier)
    found = {"in_channels": dataset.channels, "input_size": dataset.size, "num_classes": dataset.num_classes}
    if wrong := differences(found, vars(model)):
        flags = " ".join(
            f"--model.{name.replace('_', '-')} {found[name]}" for name in SHAPE if f"model.{name} " in wrong
        )
        raise UsageError(f"data.path {spec.path} does not fit: {wrong}; set {flags}, or another data.path")
    if cached is not None:
        dataset.companion = open_features(spec, cached, dataset.shards, grid)
    return dataset
