"""Latents per second of vadit's loader against the reference code's way: python benchmarks/bench_latents.py

    python benchmarks/bench_latents.py [--num-latents 20000] [--batch 256] [--rounds 3] [--only KIND ...]
        [--folder DIR] [--no-save]

Kinds: one posterior sample as the reference stores it (bf16 and fp32), and moments (bf16), all 32 x 16 x 16, plain and
mirrored, in shards of 10,000, warm in the page cache. A contender hands out batches in random order: latents, plain or
mirrored by chance, normalised, float32, and labels. The reference opens a file per sample (`safe_open`, `get_slice`)
in a torch DataLoader; for moments it draws the posterior with torch.

Contenders take turns. A turn opens the loader, takes FILL batches and times those that follow, in a steady state.
Then the index: 128 names of one shard, as ImageNet has: time to open 1,280,000 latents, and from a saved position to
the first batch. Rows go to benchmarks/results/latent-loaders-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vadit.latents.dataset import LatentDataset
from vadit.latents.loader import LatentLoader

CHANNELS, SIDE, CLASSES = 32, 16, 1000
SHARD_SIZE, NUM_SHARDS = 10_000, 128
FILL = 5  # Batches that are not timed: every queue here holds fewer.
MIN_TURN_S = 0.5
WORKERS = 2  # Processes of the reference's loader, and threads of vadit's.
KINDS = {"sample": torch.bfloat16, "sample-fp32": torch.float32, "moments": torch.bfloat16}
SHOWN = ("kind", "contender", "median_per_s", "ratio", "open_s", "restore_s")

Stream = Callable[[], contextlib.AbstractContextManager[Iterator[object]]]
"""Opens a loader; the iterator gives batches for ever."""
Row = dict[str, Any]


def make_folder(folder: Path, count: int, kind: str) -> Path:
    """Shards in the reference's layout."""
    folder.mkdir(parents=True)
    key, channels = ("moments", 2 * CHANNELS) if kind == "moments" else ("latents", CHANNELS)
    for number, start in enumerate(range(0, count, SHARD_SIZE)):
        rows = min(SHARD_SIZE, count - start)
        stored = torch.randn(1000, channels, SIDE, SIDE)
        if kind == "moments":
            stored[:, CHANNELS:] = stored[:, CHANNELS:].abs() * 0.1
        stored = stored.to(KINDS[kind]).repeat(-(-rows // 1000), 1, 1, 1)[:rows]
        tensors = {key: stored, f"{key}_flip": stored.flip(-1), "labels": torch.randint(CLASSES, (rows,))}
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")
    values = {"mean": torch.rand(1, CHANNELS, 1, 1), "std": torch.rand(1, CHANNELS, 1, 1) + 0.5}
    torch.save(values, folder / "latents_stats.pt")
    return folder


# ------------------------------------------------------------------------------------------------ contenders


class ReferenceLatents(Dataset[tuple[Tensor, Tensor]]):
    """Reads as the reference code does: an index of all samples, and a file opened for each sample."""

    def __init__(self, folder: Path) -> None:
        self.index: dict[int, tuple[str, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                self.key = "moments" if "moments" in file.keys() else "latents"  # noqa: SIM118 (no mapping)
                count = file.get_slice("labels").get_shape()[0]
            for row in range(count):
                self.index[len(self.index)] = (str(path), row)
        saved = torch.load(folder / "latents_stats.pt", weights_only=True)
        self.mean, self.std = saved["mean"], saved["std"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, row = self.index[index]
        with safe_open(path, framework="pt", device="cpu") as file:
            key = self.key if torch.rand(()) > 0.5 else f"{self.key}_flip"
            stored = file.get_slice(key)[row : row + 1]
            label = file.get_slice("labels")[row : row + 1]
        if self.key == "moments":
            mean, std = stored.float().chunk(2, dim=1)
            stored = mean + std * torch.randn_like(mean)
        return ((stored - self.mean) / self.std)[0], label[0]


def reference_stream(folder: Path, options: argparse.Namespace) -> Stream:
    def batches() -> Iterator[object]:
        data = ReferenceLatents(folder)
        loader = DataLoader(data, options.batch, shuffle=True, num_workers=WORKERS, drop_last=True, pin_memory=False)
        while True:
            yield from loader

    return lambda: contextlib.closing(batches())  # which ends the workers


def our_stream(data: LatentDataset, options: argparse.Namespace) -> Stream:
    return lambda: contextlib.closing(LatentLoader(data, options.batch).stream())


def turn(stream: Stream, options: argparse.Namespace) -> float:
    """Latents per second, until MIN_TURN_S are over."""
    with stream() as batches:
        for _ in range(FILL):
            next(batches)
        started, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < MIN_TURN_S:
            next(batches)
            count += 1
        return options.batch * count / passed


def measure(folder: Path, kind: str, options: argparse.Namespace) -> list[Row]:
    """All rounds of one kind of latents."""
    make_folder(folder, options.num_latents, kind)
    contenders = {
        "reference": reference_stream(folder, options),
        "vadit": our_stream(LatentDataset(folder), options),  # opened once, as in a run
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name, stream in contenders.items():
            speeds[name].append(turn(stream, options))
        done = "  ".join(f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
        print(f"{kind} round {number + 1}: {done}", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return [
        row(options, values, options.num_latents, kind, name, ratio=round(medians[name] / medians["reference"], 2))
        for name, values in speeds.items()
    ]


def measure_index(folder: Path, options: argparse.Namespace) -> Row:
    """Opening, restoring a position in the middle, and the pace of a folder of many latents."""
    shard = make_folder(folder, SHARD_SIZE, "sample") / "latents_rank00_shard000.safetensors"
    for number in range(1, NUM_SHARDS):
        shard.with_name(f"latents_rank00_shard{number:03d}.safetensors").symlink_to(shard)
    started = time.perf_counter()
    data = LatentDataset(folder)
    open_s = time.perf_counter() - started
    started = time.perf_counter()
    loader = LatentLoader(data, options.batch)
    loader.load_state_dict(loader.state_dict() | {"images_seen": len(data) // 2 + 12_345})
    with contextlib.closing(loader.stream()) as stream:
        next(stream)
        restore_s = time.perf_counter() - started
    values = [turn(our_stream(data, options), options) for _ in range(options.rounds)]
    return row(options, values, len(data), "index", "vadit", open_s=round(open_s, 4), restore_s=round(restore_s, 4))


def row(options: argparse.Namespace, values: list[float], num: int, kind: str, contender: str, **extra: float) -> Row:
    """A line of the CSV. `extra`: ratio to the reference's way; of the index, open_s from the folder's name to a data
    set, and restore_s from a saved position to the first batch."""
    q1, median, q3 = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    stamp = harness.stamp("cpu", ("../vadit/latents", "../vadit/runtime/*.py", "../benchmarks/*.py"), "safetensors")
    stamp["hardware"] += f", {len(os.sched_getaffinity(0))} cores"
    return stamp | {
        "num_latents": num, "kind": kind, "shape": f"{CHANNELS}x{SIDE}x{SIDE}", "batch": options.batch,
        "contender": contender, "workers": WORKERS, "median_per_s": round(median), "q1_per_s": round(q1),
        "q3_per_s": round(q3), "rounds": len(values), "ratio": "", "open_s": "", "restore_s": "", **extra,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-latents", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[*KINDS, "index"], choices=[*KINDS, "index"])
    parser.add_argument("--folder", type=Path, help="for the data, some GB; it is removed again")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for kind in options.only:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:  # one kind at a time on the disk
            folder = Path(scratch) / kind
            rows += [measure_index(folder, options)] if kind == "index" else measure(folder, kind, options)
    for line in rows:
        print({name: line[name] for name in SHOWN})
    if not options.no_save:
        harness.append(harness.RESULTS / f"latent-loaders-{harness.hardware('cpu')}.csv", rows)


if __name__ == "__main__":
    main()
