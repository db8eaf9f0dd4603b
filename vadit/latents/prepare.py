"""A folder of latents -> one .beton, for loaders that read nothing else; `vadit train` reads both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadit.latents.beton import DTYPES, BetonLatents, write_latents
from vadit.latents.folder import open_checked
from vadit.latents.shards import INDEX_FILE, LatentShard, write_atomically
from vadit.latents.statistics import statistics_path
from vadit.runtime.errors import RunError, UsageError

BATCH = 64


def prepare_latents(
    source: str | Path, out: str | Path, *, progress: Callable[[int, int], object] | None = None
) -> int:
    """Write the latents of folder `source` into `out`, bit by bit as they are, in their order; their number.

    Ids are the latents' places in the folder, so that mirroring and noise are the same for both. latents_stats.pt is
    copied beside the result, where the source has one. `progress` is called with the latents written and their number.

    UsageError: `out` is there, or what it would lie beside does not fit. RunError: the source is damaged, the disk is
    full, or what was written does not read back.
    """
    source, out = Path(source), Path(out)
    if out.suffix != ".beton" or out.exists():
        problem = "is there already" if out.exists() else "does not end in .beton"
        raise UsageError(f"{out} {problem}; choose another name for the result")
    shards = open_checked(source, "raise").shards
    first = shards[0]
    flip = all(shard.flipped is not None for shard in shards)
    if not flip and any(shard.flipped is not None for shard in shards):
        raise UsageError(f"{source} holds mirrored latents in some shards only; encode it anew")
    count = sum(shard.count for shard in shards)
    statistics = _statistics(source, out)
    names = {kind: name for name, kind in DTYPES.items()}
    write_latents(
        out,
        _rows(shards, flip, count, progress),
        count=count,
        shape=first.stored_shape,
        dtype=names[first.dtype],
        has_moments=first.has_moments,
        flip=flip,
        notes={"source": source.name, **_classes(source)},
    )
    if statistics is not None:
        write_atomically(statistics_path(out), statistics)
    found = BetonLatents(out)
    labels = torch.cat([shard.labels for shard in shards])
    if not torch.equal(found.labels, labels):
        raise RunError(f"{out} was written, but its labels are not those of {source}; remove it")
    for index in range(count):
        found.verify(index)
    return count


def _rows(
    shards: list[LatentShard], flip: bool, count: int, progress: Callable[[int, int], object] | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    done = 0
    for shard in shards:
        for start in range(0, shard.count, BATCH):
            stop = min(start + BATCH, shard.count)
            flipped = shard.rows(start, stop, flipped=True) if flip else None
            ids = torch.arange(done, done + stop - start)
            yield shard.rows(start, stop, flipped=False), flipped, shard.labels[start:stop], ids
            done += stop - start
            if progress is not None:
                progress(done, count)


def _classes(source: Path) -> dict[str, Any]:
    """Names of the classes, where the index of the folder has them."""
    try:
        return {"classes": json.loads((source / INDEX_FILE).read_text())["classes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the authors' folders have no index


def _statistics(source: Path, out: Path) -> bytes | None:
    """Content of the statistics to be copied; refuses a place where those of other latents lie."""
    path, target = statistics_path(source), statistics_path(out)
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not target.is_file():
        return content
    if target.read_bytes() != content:
        raise UsageError(f"{target} is of other latents; choose another folder for {out.name}")
    return None
