"""Mean and standard deviation per channel of a folder of latents: latents_stats.pt, computed and read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vadit.latents.shards import STATISTICS_FILE, LatentShard, open_folder
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import saved_file
from vadit.runtime.torch_file import is_plain, load_torch

READ_AT_ONCE = 512  # latents read at a time: 8 MiB of bfloat16 32 x 16 x 16
BLOCK = 32  # latents summed up at a time: small enough for a core's cache
SMALLEST_STD = 1e-8


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation per channel, float32 (1, d, 1, 1) each."""

    mean: Tensor
    std: Tensor


def load_statistics(folder: str | Path, channels: int) -> ChannelStatistics:
    """Read latents_stats.pt: {"mean", "std"}, (1, d, 1, 1) each."""
    path = Path(folder) / STATISTICS_FILE
    if not path.exists():
        raise UsageError(
            f"{folder} has no {STATISTICS_FILE}; run `vadit encode --stats-only {folder}`, or set --no-normalize "
            "(vadit train: --data.no-normalize)"
        )
    remedy = f"remove it and run `vadit encode --stats-only {folder}`"
    values = load_torch(path, remedy)
    held = values if isinstance(values, dict) else {}
    kept = [value for key in ("mean", "std") if is_plain(value := held.get(key))]
    if len(kept) < 2:
        raise RunError(f"{path} does not hold the tensors mean and std; {remedy}")
    if wrong := [each.numel() for each in kept if each.numel() != channels]:
        raise RunError(f"{path} has {wrong[0]} channels but the latents have {channels}; {remedy}")
    mean, std = (each.float().reshape(1, -1, 1, 1) for each in kept)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise RunError(f"{path} holds a standard deviation or mean that is not finite and positive; {remedy}")
    return ChannelStatistics(mean, std)


def compute_statistics(folder: str | Path, *, samples: int = 0, seed: int = 0) -> ChannelStatistics:
    """Mean and unbiased standard deviation per channel over ALL latents, plain and mirrored; writes latents_stats.pt.

    One pass: sums of small blocks in float32 around the block's mean, merged in float64 as in Chan, Golub & LeVeque
    (1983). Where moments are stored the statistics are those of a posterior sample: the variance of the means plus the
    mean of the variances. `samples`: only so many random latents, each plain or mirrored by chance (the authors take
    10,000), a function of `seed`; 0 for all. RunError names a shard with values that are not finite.
    """
    shards = open_folder(Path(folder))
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for shard, rows in _rows(shards, samples, seed):
        for block in rows.split(BLOCK):
            part_count = block[:, 0].numel()
            part_mean, part_squares = _block_sums(block.float().flatten(2), has_moments=shard.has_moments)
            if not (part_mean.isfinite().all() and part_squares.isfinite().all()):
                raise shard.damage("it holds values that are not finite, or whose squares are too large for float32")
            delta, total = part_mean - mean, count + part_count
            mean = mean + delta * (part_count / total)
            squares = squares + part_squares + delta**2 * (count * part_count / total)
            count = total
    if count < 2:
        raise RunError(f"{folder} holds too few latents for statistics; encode at least two values per channel")
    std = (squares / (count - 1)).sqrt().clamp(min=SMALLEST_STD)
    statistics = ChannelStatistics(mean.float().reshape(1, -1, 1, 1), std.float().reshape(1, -1, 1, 1))
    with saved_file(Path(folder) / STATISTICS_FILE) as partial:
        torch.save({"mean": statistics.mean, "std": statistics.std}, partial)
    return statistics


def _rows(shards: list[LatentShard], samples: int, seed: int) -> Iterator[tuple[LatentShard, Tensor]]:
    """Stored rows (B, c, h, w): all, plain and mirrored, or `samples` different ones, each plain or mirrored."""
    total = sum(shard.count for shard in shards)
    some = 0 < samples < total
    if some:
        ids = rng.permute(torch.arange(samples), total, rng.fold(seed, "statistics")).sort().values
        mirrored = rng.uniform(rng.fold(seed, "statistics flip"), ids) < 0.5
    begin = 0
    for shard in shards:
        for flipped in (False, True) if shard.has_flipped else (False,):
            if not some:
                for start in range(0, shard.count, READ_AT_ONCE):
                    stop = min(start + READ_AT_ONCE, shard.count)
                    yield shard, shard.rows(start, stop, flipped=flipped)
                continue
            wanted = (ids >= begin) & (ids < begin + shard.count) & ((mirrored == flipped) | (not shard.has_flipped))
            for part in (ids[wanted] - begin).split(READ_AT_ONCE):
                rows = [shard.rows(place, place + 1, flipped=flipped) for place in part.tolist()]
                if rows:
                    yield shard, torch.cat(rows)
        begin += shard.count


def _block_sums(block: Tensor, *, has_moments: bool) -> tuple[Tensor, Tensor]:
    """Mean (d,) and sum of squared distances to it (d,), float64, of float32 (B, c, n)."""
    values, posterior_std = block.chunk(2, dim=1) if has_moments else (block, None)
    count = values.shape[0] * values.shape[2]
    near = (values.sum(2).double().sum(0) / count).float()
    apart = values - near[:, None]  # small numbers, whose float32 sums are good to 1e-7
    rest = apart.sum(2).double().sum(0)
    squares = apart.square_().sum(2).double().sum(0) - rest**2 / count
    if posterior_std is not None:
        squares = squares + posterior_std.square().sum(2).double().sum(0)
    return near.double() + rest / count, squares
