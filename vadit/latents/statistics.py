"""Mean and standard deviation per channel of a folder of latents: latents_stats.pt, computed and read."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vadit.config import LatentDataSpec
from vadit.latents.folder import open_sound_shards
from vadit.latents.shards import STATISTICS_FILE, LatentShard, open_folder, write_atomically
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError

logger = logging.getLogger(__name__)

STATISTICS_CHUNK = 512
"""Latents read at a time while statistics are computed: 8 MiB of bfloat16 32 x 16 x 16."""
STATISTICS_BLOCK = 32
"""Latents summed up at a time: small enough for a core's cache."""
SMALLEST_STD = 1e-8


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation per channel, float32 (1, d, 1, 1) each."""

    mean: Tensor
    std: Tensor


def statistics_path(path: str | Path) -> Path:
    """Where the statistics of a folder of latents lie."""
    return Path(path) / STATISTICS_FILE


def load_statistics(folder: str | Path, channels: int) -> ChannelStatistics:
    """Read latents_stats.pt: {"mean", "std"}, (1, d, 1, 1) each."""
    path = statistics_path(folder)
    if not path.exists():
        raise UsageError(
            f"{folder} has no {STATISTICS_FILE}; run `vadit encode --stats-only {folder}`, or set --no-normalize "
            "(vadit train: --data.no-normalize)"
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


def compute_statistics(
    folder: str | Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = LatentDataSpec.on_error,
    max_bad_share: float = LatentDataSpec.max_bad_share,
) -> ChannelStatistics:
    """Mean and unbiased standard deviation per channel over ALL latents, plain and mirrored; writes latents_stats.pt.

    One pass: sums of small blocks in float32 around the block's mean, merged in float64 as in Chan, Golub & LeVeque
    (1983). Where moments are stored the statistics are those of a posterior sample: the variance of the means plus the
    mean of the variances. `samples`: only so many random latents, each plain or mirrored by chance (the authors take
    10,000), a function of `seed`; None or 0 for all. on_error="skip" leaves out, and counts, shards that do not open
    and latents that are not finite, of these up to max_bad_share of what is read; else RunError names them.
    """
    if samples is not None and samples < 0:
        raise UsageError(f"--stats-samples is {samples}; it must be at least 1, or 0 for all latents")
    sums = _Sums()
    if on_error == "skip":
        shards, faults = open_sound_shards(Path(folder))
        sums.left_out += list(faults)
    else:
        shards = open_folder(Path(folder))
    total = sum(shard.count for shard in shards)
    parts = _sampled_parts(shards, samples, seed) if samples and samples < total else _all_parts(shards)
    for part in parts:
        for start in range(0, len(part.rows), STATISTICS_BLOCK):
            sums.add(part, start, skip=on_error == "skip")
    if sums.num_bad > max_bad_share * sums.num_read:
        raise RunError(
            f"{sums.num_bad} of {sums.num_read} latents of {folder} are not finite, more than max_bad_share "
            f"{max_bad_share:g} allows: {', '.join(sums.left_out[:10])}; encode or fetch them anew"
        )
    if sums.count < 2:
        raise RunError(f"{folder} holds too few latents for statistics; encode at least two values per channel")
    if sums.left_out:
        logger.warning(
            "the statistics of %s leave out %d damaged shards or latents: %s",
            folder,
            len(sums.left_out),
            ", ".join(sums.left_out[:10]),
        )
    std = (sums.squares / (sums.count - 1)).sqrt().clamp(min=SMALLEST_STD)
    statistics = ChannelStatistics(sums.mean.float().reshape(1, -1, 1, 1), std.float().reshape(1, -1, 1, 1))
    buffer = io.BytesIO()
    torch.save({"mean": statistics.mean, "std": statistics.std}, buffer)
    write_atomically(statistics_path(folder), buffer.getvalue())
    return statistics


@dataclass(frozen=True)
class _Part:
    """Some stored rows (B, c, h, w), and the place of each in the shard."""

    shard: LatentShard
    rows: Tensor
    places: np.ndarray


def _all_parts(shards: list[LatentShard]) -> Iterator[_Part]:
    """Every row, plain and mirrored; the next chunk is read while one is summed up."""
    chunks = [
        (shard, flipped, start, min(start + STATISTICS_CHUNK, shard.count))
        for shard in shards
        for flipped in ((False, True) if shard.flipped is not None else (False,))
        for start in range(0, shard.count, STATISTICS_CHUNK)
    ]

    def read(chunk: tuple[LatentShard, bool, int, int]) -> _Part:
        shard, flipped, start, stop = chunk
        return _Part(shard, shard.rows(start, stop, flipped=flipped), np.arange(start, stop))

    with ThreadPoolExecutor(1, thread_name_prefix="vadit-data") as pool:
        ahead = pool.submit(read, chunks[0]) if chunks else None
        for chunk in [*chunks[1:], None]:
            if ahead is not None:
                part = ahead.result()
                ahead = pool.submit(read, chunk) if chunk is not None else None
                yield part


def _sampled_parts(shards: list[LatentShard], samples: int, seed: int) -> Iterator[_Part]:
    """`samples` different latents in the order of the files, each plain or mirrored."""
    counts = [shard.count for shard in shards]
    ids = rng.permute(torch.arange(samples), sum(counts), rng.fold(seed, "statistics")).sort().values
    flips = (rng.uniform(rng.fold(seed, "statistics flip"), ids) < 0.5).numpy()
    begin = 0
    for shard in shards:
        mine = (ids >= begin) & (ids < begin + shard.count)
        places = (ids[mine] - begin).numpy()
        mirrored = flips[mine.numpy()] & (shard.flipped is not None)
        for flipped in (False, True):
            wanted = places[mirrored == flipped]
            for start in range(0, len(wanted), STATISTICS_CHUNK):
                chosen = wanted[start : start + STATISTICS_CHUNK]
                rows = [shard.rows(place, place + 1, flipped=flipped) for place in chosen.tolist()]
                yield _Part(shard, torch.cat(rows), chosen)
        begin += shard.count


class _Sums:
    """Values per channel, their mean (d,) and the sum of their squared distances to it (d,), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.squares: Tensor = torch.zeros((), dtype=torch.float64)
        self.left_out: list[str] = []
        self.num_read = self.num_bad = 0

    def add(self, part: _Part, start: int, *, skip: bool) -> None:
        """Merge STATISTICS_BLOCK rows of a part from `start` on."""
        block = part.rows[start : start + STATISTICS_BLOCK].float().flatten(2)
        self.num_read += len(block)
        found = _block_sums(block, has_moments=part.shard.has_moments)
        if not all(torch.isfinite(value).all() for value in found):
            good = torch.isfinite(block).flatten(1).all(1)
            bad = part.places[start : start + len(block)][~good.numpy()].tolist()
            if not bad:
                raise RunError(f"{part.shard.path} holds values whose squares are too large for float32")
            if not skip:
                raise RunError(
                    f"{part.shard.path} holds values that are not finite, the first in row {bad[0]}; "
                    "encode or fetch the file anew, or leave them out with --on-error skip"
                )
            self.left_out += [f"{part.shard.path} row {place}" for place in bad]
            self.num_bad += len(bad)
            block = block[good]
            found = _block_sums(block, has_moments=part.shard.has_moments)
        part_mean, part_squares = found
        part_count = block.shape[0] * block.shape[2]
        if part_count == 0:
            return
        total = self.count + part_count
        delta = part_mean - self.mean
        self.mean = self.mean + delta * (part_count / total)
        self.squares = self.squares + part_squares + delta**2 * (self.count * part_count / total)
        self.count = total


def _block_sums(block: Tensor, *, has_moments: bool) -> tuple[Tensor, Tensor]:
    """Mean (d,) and sum of squared distances to it (d,), float64, of float32 (B, c, n)."""
    values, posterior_std = block.chunk(2, dim=1) if has_moments else (block, None)
    count = max(values.shape[0] * values.shape[2], 1)
    near = (values.sum(2).double().sum(0) / count).float()
    apart = values - near[:, None]  # small numbers, whose float32 sums are good to 1e-7
    rest = apart.sum(2).double().sum(0)
    squares = apart.square_().sum(2).double().sum(0) - rest**2 / count
    if posterior_std is not None:
        squares = squares + posterior_std.square().sum(2).double().sum(0)
    return near.double() + rest / count, squares
