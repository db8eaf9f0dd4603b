"""Latents for the generator: the data set over memory-mapped shards, its statistics, and the loader.

Which of plain and mirrored latent is taken and the posterior's noise are functions of (seed, image id, epoch) alone,
where the image id is the latent's index in the folder.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vadit import rng
from vadit.config import DiTSpec, LatentDataSpec
from vadit.data.latent_shards import STATISTICS_FILE, LatentShard, open_folder, read_index, write_atomically
from vadit.data.stream import PositionedLoader, debug_count, sample_ids
from vadit.errors import RunError, UsageError

STATISTICS_CHUNK = 512
"""Latents read at a time while statistics are computed: 64 MiB of float64 at 32 x 16 x 16 x 512."""
SMALLEST_STD = 1e-8
LOADER_THREADS = 2
"""Batches made at the same time; the work is copies and arithmetic outside the interpreter's lock."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation per channel, float32 (1, d, 1, 1) each."""

    mean: Tensor
    std: Tensor


class LatentSource(Protocol):
    """What trainers and LatentLoader need of a set of latents."""

    channels: int
    size: int
    num_classes: int
    mean: Tensor
    std: Tensor

    def __len__(self) -> int: ...

    def batch(self, ids: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor]: ...


class LatentDataset:
    """A folder of latents, from `vadit encode` or in the authors' layout (`latents`, `latents_flip`, `labels`).

    `mean` and `std`, (1, d, 1, 1), are what normalisation uses: 0 and 1 where `normalize` is off. A normalised latent
    is (z - mean) / std * multiplier, and `denormalize` is its inverse.
    """

    def __init__(
        self,
        folder: str | Path,
        normalize: bool = LatentDataSpec.normalize,
        flip: bool = LatentDataSpec.flip,
        multiplier: float = LatentDataSpec.multiplier,
    ) -> None:
        if not str(folder):
            raise UsageError("data.path is empty; set --data.path to a folder that `vadit encode` wrote")
        self.folder = Path(folder)
        self.shards = open_folder(self.folder)
        self.flip = flip
        self.multiplier = multiplier
        self.channels, self.size, width = self.shards[0].shape
        if self.size != width:
            raise UsageError(f"data.path {folder} holds latents of {self.size} x {width}; the generator needs squares")
        if flip and any(shard.flipped is None for shard in self.shards):
            raise UsageError(f"data.path {folder} holds no mirrored latents; set --no-data.flip, or encode with flip")
        self.labels = torch.cat([shard.labels for shard in self.shards])
        self.num_classes = self._count_classes()
        self._ends = np.cumsum([shard.count for shard in self.shards])
        self._starts = self._ends - [shard.count for shard in self.shards]
        if normalize:
            statistics = load_statistics(self.folder, self.channels)
        else:
            statistics = ChannelStatistics(torch.zeros(1, self.channels, 1, 1), torch.ones(1, self.channels, 1, 1))
        self.mean, self.std = statistics.mean, statistics.std

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Latents (B, d, h, w) float32, normalised, and labels (B,) int64 of the samples `ids` in this epoch."""
        flips = rng.uniform(rng.fold(seed, "flip", epoch), ids) < 0.5 if self.flip else torch.zeros(len(ids))
        stored = self._gather(ids, flips.bool())
        if self.shards[0].has_moments:
            mean, std = stored.chunk(2, dim=1)
            latents = rng.normal(rng.fold(seed, "posterior", epoch), ids, self.shards[0].shape).mul_(std).add_(mean)
        else:
            latents = stored
        latents.sub_(self.mean).div_(self.std)
        if self.multiplier != 1:
            latents.mul_(self.multiplier)
        return latents, self.labels[ids]

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, d, h, w) as the autoencoder's decoder takes them."""
        mean, std = self.mean.to(latents), self.std.to(latents)
        return latents / self.multiplier * std + mean

    def _gather(self, ids: Tensor, flips: Tensor) -> Tensor:
        """Stored rows (B, c, h, w) as a new float32 tensor; touches no other rows of the files."""
        which = np.searchsorted(self._ends, ids.numpy(), side="right")
        rows = ids.numpy() - self._starts[which]
        first = self.shards[0]
        buffer = np.empty((len(rows), *first.plain.shape[1:]), first.plain.dtype)
        # Row by row, not grouped by shard: with 100 shards a batch has few rows in each.
        for place, (number, row, flip) in enumerate(zip(which.tolist(), rows.tolist(), flips.tolist(), strict=True)):
            shard = self.shards[number]
            source = shard.flipped if flip and shard.flipped is not None else shard.plain
            buffer[place] = source[row]
        stored = torch.from_numpy(buffer)
        return (stored.view(torch.bfloat16) if first.dtype == torch.bfloat16 else stored).float()

    def _count_classes(self) -> int:
        index = read_index(self.folder)
        counts = {shard.path.name: shard.count for shard in self.shards}
        if index is None and any(shard.settings is not None for shard in self.shards):
            raise UsageError(
                f"data.path {self.folder} is not finished: run its `vadit encode` command again to complete it"
            )
        if index is not None and index["shards"] != counts:
            odd = sorted(set(index["shards"].items()) ^ set(counts.items()))[0][0]
            raise RunError(f"{self.folder / odd} does not agree with index.json; run the `vadit encode` command again")
        num_classes = index["num_classes"] if index is not None else int(self.labels.max()) + 1
        for shard in self.shards:
            outside = shard.labels[(shard.labels < 0) | (shard.labels >= num_classes)]
            if len(outside):
                raise UsageError(f"{shard.path} holds label {int(outside[0])}; labels must be in [0, {num_classes})")
        return num_classes


class DebugLatents:
    """`num_images` random latents that fit a model, made on the fly from their index."""

    def __init__(self, num_images: int, model: DiTSpec) -> None:
        self.channels = model.in_channels
        self.size = model.input_size
        self.num_classes = model.num_classes
        self.mean = torch.zeros(1, self.channels, 1, 1)
        self.std = torch.ones(1, self.channels, 1, 1)
        self.labels = rng.integers(rng.fold(0, "debug labels"), torch.arange(num_images), model.num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Latents (B, d, h, w) float32 and labels (B,) int64; the same in every epoch."""
        shape = (self.channels, self.size, self.size)
        return rng.normal(rng.fold(0, "debug latents"), ids, shape), self.labels[ids]

    def denormalize(self, latents: Tensor) -> Tensor:
        """The latents themselves: these are not normalised."""
        return latents


def open_latents(spec: LatentDataSpec, model: DiTSpec) -> LatentDataset | DebugLatents:
    """The latents that the settings name, checked to fit the model."""
    if spec.path.startswith("debug:"):
        return DebugLatents(debug_count(spec.path), model)
    dataset = LatentDataset(spec.path, spec.normalize, spec.flip, spec.multiplier)
    for found, needed, setting in (
        (dataset.channels, model.in_channels, "in_channels"),
        (dataset.size, model.input_size, "input_size"),
    ):
        if found != needed:
            raise UsageError(
                f"data.path {spec.path} holds latents of {dataset.channels} channels and side {dataset.size} but "
                f"model.{setting} is {needed}; set --model.{setting.replace('_', '-')} {found} or another data.path"
            )
    if dataset.num_classes > model.num_classes:
        raise UsageError(
            f"data.path {spec.path} has {dataset.num_classes} classes but model.num_classes is {model.num_classes}; "
            f"set --model.num-classes {dataset.num_classes}"
        )
    return dataset


class LatentLoader(PositionedLoader[tuple[Tensor, Tensor]]):
    """Shuffled (latents (B, d, h, w) float32 normalised, labels (B,) int64); see PositionedLoader for the order."""

    def __init__(
        self, dataset: LatentSource, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(len(dataset), batch_size, seed, rank, world_size, LOADER_THREADS)
        self.dataset = dataset

    def _start(self, pool: ThreadPoolExecutor, positions: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        return pool.submit(self._load, positions, self.seed).result

    def _load(self, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        parts = [self.dataset.batch(ids, epoch, seed) for epoch, ids in sample_ids(positions, self.num_samples, seed)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([latents for latents, _ in parts]), torch.cat([labels for _, labels in parts])


# ---------------------------------------------------------------------------------------------- statistics


def load_statistics(folder: str | Path, channels: int) -> ChannelStatistics:
    """Read latents_stats.pt: {"mean", "std"}, (1, d, 1, 1) each."""
    path = Path(folder) / STATISTICS_FILE
    if not path.exists():
        raise UsageError(
            f"data.path {folder} has no {STATISTICS_FILE}; run `vadit encode --stats-only {folder}`, "
            "or set --no-data.normalize"
        )
    remedy = f"remove it and run `vadit encode --stats-only {folder}`"
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (values[key].float().reshape(1, -1, 1, 1) for key in ("mean", "std"))
    except Exception as error:  # a damaged pickle raises almost any type
        raise RunError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}") from None
    if mean.shape[1] != channels or std.shape[1] != channels:
        raise RunError(f"{path} has {mean.shape[1]} channels but the latents have {channels}; {remedy}")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise RunError(f"{path} holds a standard deviation or mean that is not finite and positive; {remedy}")
    return ChannelStatistics(mean, std)


def compute_statistics(folder: str | Path) -> ChannelStatistics:
    """Mean and unbiased standard deviation per channel over ALL latents, plain and mirrored; writes latents_stats.pt.

    One pass in float64, chunk by chunk, merged as in Chan, Golub & LeVeque (1983). Where moments are stored the
    statistics are those of a posterior sample: the variance of the means plus the mean of the variances.
    """
    shards = open_folder(Path(folder))
    channels = shards[0].shape[0]
    count = 0
    mean = torch.zeros(channels, dtype=torch.float64)
    squares = torch.zeros(channels, dtype=torch.float64)  # sum of squared distances to the mean
    for shard in shards:
        for flipped in (False, True) if shard.flipped is not None else (False,):
            for start in range(0, shard.count, STATISTICS_CHUNK):
                part_count, part_mean, part_squares = _chunk_moments(shard, start, flipped)
                total = count + part_count
                delta = part_mean - mean
                mean += delta * (part_count / total)
                squares += part_squares + delta**2 * (count * part_count / total)
                count = total
    if count < 2:
        raise RunError(f"{folder} holds too few latents for statistics; encode at least two values per channel")
    std = (squares / (count - 1)).sqrt().clamp(min=SMALLEST_STD)
    statistics = ChannelStatistics(mean.float().reshape(1, -1, 1, 1), std.float().reshape(1, -1, 1, 1))
    buffer = io.BytesIO()
    torch.save({"mean": statistics.mean, "std": statistics.std}, buffer)
    write_atomically(Path(folder) / STATISTICS_FILE, buffer.getvalue())
    return statistics


def _chunk_moments(shard: LatentShard, start: int, flipped: bool) -> tuple[int, Tensor, Tensor]:
    """Values per channel, their mean (d,) and the sum of their squared distances to it (d,), in float64."""
    rows = shard.rows(start, min(start + STATISTICS_CHUNK, shard.count), flipped=flipped).double()
    values, posterior_std = rows.chunk(2, dim=1) if shard.has_moments else (rows, None)
    variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
    if not torch.isfinite(variance).all():
        raise RunError(f"{shard.path} holds values that are not finite; encode or fetch the file anew")
    count = values.numel() // values.shape[1]
    if posterior_std is not None:
        variance = variance + (posterior_std**2).mean(dim=(0, 2, 3))
    return count, mean, variance * count
