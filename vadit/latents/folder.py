"""Which shards of a latent folder can be used, and what becomes of the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vadit.latents.shards import LatentShard, open_folder, open_shard, read_index, refuse_other_kind, shard_paths
from vadit.runtime.errors import RunError, UsageError


@dataclass(frozen=True)
class CheckedShards:
    """The shards of a folder that can be used, in file-name order."""

    shards: list[LatentShard]
    num_classes: int
    faults: dict[str, str]
    """Name of each shard that is left out -> why."""
    num_left_out: int
    """Latents in those; guessed from the other shards where neither index nor header tells."""


def open_checked(folder: Path, on_error: Literal["raise", "skip"]) -> CheckedShards:
    """A folder whose shards agree with each other, with the index where there is one, and with the number of classes.

    What does not is left out (on_error="skip") or ends in a RunError.
    """
    shards, faults = open_sound_shards(folder) if on_error == "skip" else (open_folder(folder), {})
    index = read_index(folder)
    if index is None and any(shard.settings is not None for shard in shards):
        raise UsageError(f"data.path {folder} is not finished: run its `vadit encode` command again to complete it")
    expected: dict[str, int] = index["shards"] if index is not None else {}
    counts = {shard.path.name: shard.count for shard in shards}
    if index is not None:
        remedy = "run the `vadit encode` command again"
        for name in sorted({name for name, _ in set(expected.items()) ^ set(counts.items())}):
            faults.setdefault(name, f"{folder / name} does not agree with index.json; {remedy}")
            if on_error == "raise":
                raise RunError(faults[name])
    sound = [shard for shard in shards if shard.path.name not in faults]
    num_classes = index["num_classes"] if index is not None else 0
    num_classes = num_classes or max((int(shard.labels.max()) for shard in sound if shard.count), default=0) + 1
    for shard in sound:
        outside = shard.labels[(shard.labels < 0) | (shard.labels >= num_classes)]
        if len(outside):
            problem = f"{shard.path} holds label {int(outside[0])}; labels must be in [0, {num_classes})"
            if on_error == "raise":
                raise UsageError(problem)
            faults[shard.path.name] = problem
    sound = [shard for shard in sound if shard.path.name not in faults]
    if not sound:
        raise RunError(f"none of the shards of {folder} can be used: {next(iter(faults.values()))}")
    likely = max(shard.count for shard in sound)
    num_left_out = sum(expected.get(name, counts.get(name, likely)) for name in faults)
    return CheckedShards(sound, num_classes, faults, num_left_out)


def open_sound_shards(folder: Path) -> tuple[list[LatentShard], dict[str, str]]:
    """The shards that open, in file-name order, and why the others do not (those of a rarer kind included)."""
    shards: list[LatentShard] = []
    faults: dict[str, str] = {}
    for path in shard_paths(folder):
        try:
            shards.append(open_shard(path))
        except RunError as error:
            faults[path.name] = str(error)
    if not shards:
        raise RunError(f"none of the {len(faults)} shards of {folder} opens: {next(iter(faults.values()))}")
    common = Counter(shard.kind for shard in shards).most_common(1)[0][0]
    first = next(shard for shard in shards if shard.kind == common)
    for shard in shards:
        try:
            refuse_other_kind(shard, first)
        except RunError as error:
            faults[shard.path.name] = str(error)
    return [shard for shard in shards if shard.path.name not in faults], faults
