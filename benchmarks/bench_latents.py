"""Latents per second of vadit's loader against the reference code's way: python benchmarks/bench_latents.py

    python benchmarks/bench_latents.py [--num-latents 20000] [--batch 256] [--rounds 3] [--only KIND ...]
        [--folder DIR] [--no-save]

Kinds: one posterior sample as the reference stores it (bf16 and fp32), and moments (bf16), all 32 x 16 x 16, plain and
mirrored, in shards of 10,000, warm in the page cache. A contender hands out batches in random order: latents, plain or
mirrored by chance, normalised, float32, and labels. The reference opens a file per sample (`safe_open`, `get_slice`)
in a torch DataLoader; for moments it draws the posterior with torch. "memcpy" copies the stored bytes of a batch, rows
in random order, from mapped files to one buffer: no more than reading.

Contenders take turns. A turn opens the loader, takes FILL batches and times those that follow, in a steady state.
Then the index: 20,000 and 1,280,000 latents of 1 x 1 x 1, so that nothing but the bookkeeping costs, and a folder of
128 shards of 10,000 latents of full size without content (sparse files): time to open it, and from a saved position to
the first batch. Rows go to benchmarks/results/latent-loaders-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import harness
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vadit.latents.dataset import LatentDataset, LatentLoader
from vadit.latents.shards import open_folder

CHANNELS, SIDE, CLASSES = 32, 16, 1000
SHARD_SIZE = 10_000
FILL = 5
"""Batches that are not timed: every queue here holds fewer."""
MIN_TURN_S, MIN_BATCHES = 0.25, 6
BASELINE = "reference"
KINDS = {"sample": torch.bfloat16, "sample-fp32": torch.float32, "moments": torch.bfloat16}
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}

Stream = Callable[[], contextlib.AbstractContextManager[Iterator[object]]]
"""Opens a loader; the iterator gives batches for ever."""


@dataclass(frozen=True)
class Row(harness.Stamp):
    """One line of the CSV."""

    num_latents: int
    kind: str
    shape: str
    batch: int
    contender: str
    workers: int
    median_per_s: float
    """Latents (of the index: latents of one number) per second."""
    q1_per_s: float
    q3_per_s: float
    ratio: float
    """To the reference's way with as many workers (vadit's two threads: with 2)."""
    share_of_memcpy: float
    open_s: float
    """Index: from the folder's name to a data set."""
    restore_s: float
    """Index: from a saved position to the first batch."""
    rounds: int


# ------------------------------------------------------------------------------------------------ data


def make_folder(folder: Path, count: int, shape: tuple[int, int, int], kind: str, *, sparse: bool = False) -> Path:
    """Shards in the reference's layout. `sparse`: files of the right size without content."""
    folder.mkdir(parents=True)
    dtype, key = KINDS[kind], "moments" if kind == "moments" else "latents"
    channels, height, width = (shape[0] * (1 + (kind == "moments")), *shape[1:])
    tile = torch.randn(1000, channels, height, width)
    if kind == "moments":
        tile[:, shape[0] :] = tile[:, shape[0] :].abs() * 0.1
    content = tile.to(dtype).view(torch.uint8).numpy().reshape(-1).data
    for number, start in enumerate(range(0, count, SHARD_SIZE)):
        rows = min(SHARD_SIZE, count - start)
        sizes = {name: rows * len(content) // 1000 for name in (key, f"{key}_flip")} | {"labels": 8 * rows}
        header, offset = {}, 0
        for name, size in sizes.items():
            full = [rows] if name == "labels" else [rows, channels, height, width]
            kinds = NAMES[torch.int64] if name == "labels" else NAMES[dtype]
            header[name] = {"dtype": kinds, "shape": full, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"latents_rank00_shard{number:03d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                file.truncate(8 + len(text) + offset)
                continue
            for size in list(sizes.values())[:2]:
                for begin in range(0, size, len(content)):
                    file.write(content[: min(size - begin, len(content))])
            file.write(np.random.default_rng(number).integers(0, CLASSES, rows).tobytes())
    values = {"mean": torch.rand(1, shape[0], 1, 1), "std": torch.rand(1, shape[0], 1, 1) + 0.5}
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


def reference_stream(folder: Path, options: argparse.Namespace, workers: int) -> Stream:
    @contextlib.contextmanager
    def start() -> Iterator[Iterator[object]]:
        data = ReferenceLatents(folder)
        loader = DataLoader(data, options.batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=False)

        def batches() -> Iterator[object]:
            while True:
                yield from loader

        stream = batches()
        yield stream
        stream.close()  # ends the workers

    return start


def our_stream(path: Path, options: argparse.Namespace) -> Stream:
    data = LatentDataset(path)  # once, as in a run: its maps stay from epoch to epoch

    @contextlib.contextmanager
    def start() -> Iterator[Iterator[object]]:
        stream = LatentLoader(data, options.batch).stream()
        yield stream
        stream.close()  # ends the threads

    return start


def memcpy_stream(folder: Path, options: argparse.Namespace) -> Stream:
    """Rows of the mapped files, in random order, to one buffer that is used again."""
    shards = open_folder(folder)
    mapped = [np.memmap(shard.path, np.uint8, mode="r").view(np.ndarray) for shard in shards]
    size = shards[0].plain.row_bytes
    buffer = np.empty((options.batch, size), np.uint8)

    places = [
        (number, rows.start + row * size)
        for number, shard in enumerate(shards)
        for rows in (shard.plain, shard.flipped or shard.plain)
        for row in range(shard.count)
    ]
    order = np.random.default_rng(0).permutation(len(places))

    @contextlib.contextmanager
    def start() -> Iterator[Iterator[object]]:
        def batches() -> Iterator[object]:
            while True:
                for begin in range(0, len(order) - options.batch, options.batch):
                    for row, place in enumerate(order[begin : begin + options.batch].tolist()):
                        number, offset = places[place]
                        buffer[row] = mapped[number][offset : offset + size]
                    yield buffer

        yield batches()

    return start


def contenders(folder: Path, kind: str, options: argparse.Namespace) -> dict[tuple[str, int], Stream]:
    """By name and workers."""
    found = {(BASELINE, workers): reference_stream(folder, options, workers) for workers in (0, 2)}
    found["vadit", 2] = our_stream(folder, options)
    found["memcpy", 0] = memcpy_stream(folder, options)
    return found


# ------------------------------------------------------------------------------------------------ timing


def turn(stream: Stream, options: argparse.Namespace) -> float:
    """Latents per second: MIN_BATCHES batches or more, until MIN_TURN_S are over."""
    with stream() as batches:
        for _ in range(FILL):
            next(batches)
        started = time.perf_counter()
        count = 0
        while (passed := time.perf_counter() - started) < MIN_TURN_S or count < MIN_BATCHES:
            next(batches)
            count += 1
        return options.batch * count / passed


def measure(folder: Path, kind: str, options: argparse.Namespace) -> list[Row]:
    """All rounds of one kind of latents."""
    found = contenders(folder, kind, options)
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in found}
    for number in range(options.rounds):
        for key, stream in found.items():
            speeds[key].append(turn(stream, options))
        done = "  ".join(f"{name}/{workers} {speeds[name, workers][-1]:,.0f}" for name, workers in found)
        print(f"{kind} round {number + 1}: {done}", flush=True)
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    rows = []
    for (name, workers), values in speeds.items():
        rows.append(
            row(
                options,
                values,
                num_latents=options.num_latents,
                kind=kind,
                shape=f"{CHANNELS}x{SIDE}x{SIDE}",
                contender=name,
                workers=workers,
                ratio=round(medians[name, workers] / medians[BASELINE, workers], 2),
                share_of_memcpy=round(medians[name, workers] / medians["memcpy", 0], 3),
            )
        )
    return rows


def measure_index(folder: Path, shape: tuple[int, int, int], options: argparse.Namespace) -> Row:
    """Opening, restoring a position in the middle, and the pace of a folder of many latents."""
    started = time.perf_counter()
    data = LatentDataset(folder)
    open_s = time.perf_counter() - started
    state = LatentLoader(data, options.batch).state_dict() | {"images_seen": len(data) // 2 + 12_345}
    started = time.perf_counter()
    loader = LatentLoader(data, options.batch)
    loader.load_state_dict(state)
    stream = loader.stream()
    next(stream)
    restore_s = time.perf_counter() - started
    stream.close()
    opened = our_stream(folder, options)
    values = [turn(opened, options) for _ in range(options.rounds)]
    return row(
        options,
        values,
        num_latents=len(data),
        kind="index",
        shape="x".join(map(str, shape)),
        contender="vadit",
        workers=2,
        open_s=round(open_s, 4),
        restore_s=round(restore_s, 4),
    )


def row(options: argparse.Namespace, values: list[float], **changes: object) -> Row:
    q1, median, q3 = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    fields: dict = {
        "date": datetime.date.today().isoformat(),
        "commit": harness.commit("../vadit/latents", "../vadit/runtime/rng.py", "../benchmarks/*.py"),
        "hardware": f"{harness.hardware('cpu')}, {len(os.sched_getaffinity(0))} cores",
        "versions": versions(),
        "batch": options.batch,
        "median_per_s": round(median),
        "q1_per_s": round(q1),
        "q3_per_s": round(q3),
        "rounds": len(values),
    }
    empty = {"ratio": "", "share_of_memcpy": "", "open_s": "", "restore_s": ""}
    return Row(**(empty | fields | changes))


def versions() -> str:
    return f"torch {torch.__version__}, numpy {np.__version__}, safetensors {metadata.version('safetensors')}"


def show(rows: list[Row]) -> None:
    print(
        f"{'latents':>9} {'kind':12} {'shape':9} {'contender':12} {'workers':>7} {'per s':>9}  ratio memcpy "
        " open, restore [s]"
    )
    for line in rows:
        index = f"{line.open_s} {line.restore_s}"
        print(
            f"{line.num_latents:9,} {line.kind:12} {line.shape:9} {line.contender:12} {line.workers:7}"
            f" {line.median_per_s:9,.0f} {line.ratio:6} {line.share_of_memcpy:6}  {index}"
        )


def save(rows: list[Row]) -> None:
    """Append to the file of this hardware."""
    harness.append(harness.RESULTS / f"latent-loaders-{harness.hardware('cpu')}.csv", rows)


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
    shape = (CHANNELS, SIDE, SIDE)
    for kind in KINDS:
        if kind in options.only:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:  # one kind at a time on the disk
                rows += measure(make_folder(Path(scratch) / kind, options.num_latents, shape, kind), kind, options)
    if "index" in options.only:
        for count in (20_000, 1_280_000):
            for size, sparse in (((1, 1, 1), False), (shape, True)):
                with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                    folder = make_folder(Path(scratch) / "index", count, size, "sample", sparse=sparse)
                    rows.append(measure_index(folder, size, options))
    show(rows)
    if not options.no_save:
        save(rows)


if __name__ == "__main__":
    main()
